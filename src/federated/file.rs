//! A server, and the task of a client, in a safetensors file each.

use super::dual::Dual;
use super::gaussian::Gaussian;
use super::layout::Layout;
use super::local::Local;
use super::method::{Client, Method};
use super::moments::Moments;
use super::server::Server;
use crate::storage::checkpoint;
use crate::{Error, Result, check};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use tch::{Kind, Tensor};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ServerContent {
    method: Method,
    round: u64,
    parameters: Layout,
    /// In order; the tensors of the third client begin with `dual.2.`.
    clients: Vec<ClientContent>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ClientContent {
    name: String,
    examples: f64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LocalContent {
    client: String,
    round: u64,
    examples: f64,
    ess: f64,
    parameters: Layout,
}

impl<Q: Gaussian> Server<Q> {
    fn form() -> String {
        format!("federated server, {}", Q::FAMILY)
    }

    /// Writes all that the server knows to one safetensors file, which [`Server::load`] reads; it is replaced
    /// atomically. Vectors in f64, the parameters one after the other: `prior.mean`, `prior.precision`, the same of
    /// `posterior`, and `dual.0.linear`, `dual.0.precision`, … of the clients in order. The description lists method,
    /// round, names, shapes and clients. Seeds of samples are not kept.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let prior = self.prior.moments()?;
        let mut tensors = Vec::new();
        put_moments(&mut tensors, "prior", &prior);
        put_moments(&mut tensors, "posterior", &self.posterior.moments()?);
        for (i, client) in self.clients.values().enumerate() {
            put_dual(&mut tensors, &format!("dual.{i}"), &client.dual);
        }
        let clients = self.clients.iter().map(|(name, c)| ClientContent { name: name.clone(), examples: c.examples });
        let content = ServerContent {
            method: self.method,
            round: self.round,
            parameters: (*prior.layout).clone(),
            clients: clients.collect(),
        };
        checkpoint::save(path.as_ref(), &Self::form(), &tensors, &content)
    }

    /// Reads what [`Server::save`] wrote, onto the CPU: the next round is that of the server that was saved, in every
    /// bit.
    ///
    /// # Errors
    /// If the file cannot be read, is broken, or holds something else: another family, tensors that are missing, left
    /// over, of another shape or not finite, precisions that are not positive definite, settings out of range.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (tensors, content): (_, ServerContent) = checkpoint::load(path, &Self::form())?;
        let read = || {
            let mut stored = Stored::new::<Q>(tensors, content.parameters)?;
            let (prior, posterior) = (stored.moments("prior")?, stored.moments("posterior")?);
            let mut clients = BTreeMap::new();
            for (i, ClientContent { name, examples }) in content.clients.into_iter().enumerate() {
                let client = Client { examples, dual: stored.dual(&format!("dual.{i}"))? };
                if clients.insert(name.clone(), client).is_some() {
                    return Err(Error::Merge(format!("the client `{name}` is given twice")));
                }
            }
            stored.finish()?;
            Self::of(content.method, content.round, &prior, &posterior, clients)
        };
        read().map_err(|e| Error::file(path, format!("does not hold a server: {e}")))
    }
}

impl<Q: Gaussian> Local<Q> {
    fn form() -> String {
        format!("federated client, {}", Q::FAMILY)
    }

    /// Writes the client's task to one safetensors file, which [`Local::load`] reads; it is replaced atomically.
    /// Tensors as in [`Server::save`]: `prior`, `posterior` and `dual`, which is the client's share.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let mut tensors = Vec::new();
        put_moments(&mut tensors, "prior", &self.prior.moments()?);
        put_moments(&mut tensors, "posterior", &self.posterior.moments()?);
        put_dual(&mut tensors, "dual", &self.share);
        let content = LocalContent {
            client: self.client.clone(),
            round: self.round,
            examples: self.examples,
            ess: self.ess,
            parameters: (*self.share.layout).clone(),
        };
        checkpoint::save(path.as_ref(), &Self::form(), &tensors, &content)
    }

    /// Reads what [`Local::save`] wrote, onto the CPU.
    ///
    /// # Errors
    /// As [`Server::load`].
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (tensors, content): (_, LocalContent) = checkpoint::load(path, &Self::form())?;
        let LocalContent { client, round, examples, ess, parameters } = content;
        let read = || {
            check::positive("examples", examples)?;
            check::positive("ess", ess)?;
            let mut stored = Stored::new::<Q>(tensors, parameters)?;
            let (prior, posterior, dual) =
                (stored.moments("prior")?, stored.moments("posterior")?, stored.dual("dual")?);
            stored.finish()?;
            let (prior, posterior) = (Q::of_moments(&prior)?, Q::of_moments(&posterior)?);
            Local::new((client, round), (examples, ess), (prior, posterior), dual)
        };
        read().map_err(|e| Error::file(path, format!("does not hold a client's task: {e}")))
    }
}

fn put_moments(tensors: &mut Vec<(String, Tensor)>, name: &str, q: &Moments) {
    tensors.push((format!("{name}.mean"), q.mean.shallow_clone()));
    tensors.push((format!("{name}.precision"), q.precision.shallow_clone()));
}

fn put_dual(tensors: &mut Vec<(String, Tensor)>, name: &str, dual: &Dual) {
    tensors.push((format!("{name}.linear"), dual.linear.shallow_clone()));
    tensors.push((format!("{name}.precision"), dual.precision.shallow_clone()));
}

/// The tensors of a file, which may come from anyone, taken out one by one.
struct Stored {
    tensors: BTreeMap<String, Tensor>,
    layout: Arc<Layout>,
    /// What shapes a vector and a precision have.
    vector: Vec<i64>,
    precision: Vec<i64>,
}

impl Stored {
    fn new<Q: Gaussian>(tensors: BTreeMap<String, Tensor>, layout: Layout) -> Result<Self> {
        let problem = "its parameters are none, have one name twice, or shapes that no tensor has";
        let n = layout.checked_len().ok_or_else(|| Error::Posterior(problem.to_owned()))?;
        Ok(Stored { tensors, layout: Arc::new(layout), vector: vec![n], precision: vec![n; Q::DIMENSIONS] })
    }

    fn take(&mut self, name: &str, shape: &[i64]) -> Result<Tensor> {
        let t = self.tensors.remove(name).ok_or_else(|| Error::parameter(name, "there is no such tensor"))?;
        if t.kind() != Kind::Double || t.size() != shape {
            let problem = format!("it is {:?} {:?}: expected f64 {shape:?}", t.kind(), t.size());
            return Err(Error::parameter(name, problem));
        }
        Ok(t)
    }

    fn pair(&mut self, name: &str, first: &str) -> Result<(Tensor, Tensor)> {
        let (vector, precision) = (self.vector.clone(), self.precision.clone());
        Ok((self.take(&format!("{name}.{first}"), &vector)?, self.take(&format!("{name}.precision"), &precision)?))
    }

    /// What no Gaussian has is refused when one is made of them.
    fn moments(&mut self, name: &str) -> Result<Moments> {
        let (mean, precision) = self.pair(name, "mean")?;
        Ok(Moments { layout: self.layout.clone(), mean, precision })
    }

    fn dual(&mut self, name: &str) -> Result<Dual> {
        let (linear, precision) = self.pair(name, "linear")?;
        let dual = Dual { layout: self.layout.clone(), linear, precision }.finite(name)?;
        if dual.precision.dim() == 2 {
            dual.check_symmetric()?;
        }
        Ok(dual)
    }

    fn finish(self) -> Result<()> {
        let extra = self.tensors.keys().next();
        extra.map_or(Ok(()), |name| Err(Error::parameter(name, "the file has this tensor, and nothing that owns it")))
    }
}
