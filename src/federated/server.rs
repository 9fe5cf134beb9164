//! The server: a posterior, and a dual for every client.

use super::dual::Dual;
use super::gaussian::{Gaussian, arranged};
use super::local::Local;
use super::method::{Answer, Client, Method, State};
use super::moments::Moments;
use crate::{Error, Result, check};
use std::collections::BTreeMap;

/// The server of one federation: method, prior, posterior, and a dual for every client by its name.
///
/// It is a plain value. Nothing here moves data or starts a client: [`Server::client`] says what there is to do, and
/// [`Server::update`] takes what came back. [`crate::federated`] has the equations and an example.
///
/// Means and precisions are in the kinds of the prior, sums in f64 on the prior's device. Clients count in the order of
/// their names, so the order of the answers makes no difference in any bit.
#[derive(Debug)]
pub struct Server<Q> {
    pub(super) method: Method,
    pub(super) round: u64,
    pub(super) prior: Q,
    pub(super) posterior: Q,
    pub(super) clients: BTreeMap<String, Client>,
}

impl<Q: Gaussian> Server<Q> {
    /// A server that knows the prior, and clients of these names and numbers of examples N_k > 0.
    ///
    /// # Errors
    /// Settings of the method out of range; no client, a client twice, a number of examples that is not positive.
    pub fn new<S: Into<String>>(
        method: impl Into<Method>,
        prior: &Q,
        clients: impl IntoIterator<Item = (S, f64)>,
    ) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let method = method.into();
        let moments = prior.moments()?;
        let mut all = BTreeMap::new();
        for (name, examples) in clients {
            let name = name.into();
            if all.insert(name.clone(), Client { examples, dual: Dual::zero(&moments) }).is_some() {
                return Err(Error::Merge(format!("the client `{name}` is given twice")));
            }
        }
        Self::of(method, 0, &moments, &moments, all)
    }

    /// What [`Server::new`] and a file have in common.
    pub(super) fn of(
        method: Method,
        round: u64,
        prior: &Moments,
        posterior: &Moments,
        clients: BTreeMap<String, Client>,
    ) -> Result<Self> {
        method.rule().validate()?;
        if clients.is_empty() {
            return Err(Error::Merge("a server needs at least one client".to_owned()));
        }
        for (name, Client { examples, .. }) in &clients {
            if check::positive("examples", *examples).is_err() {
                let problem = format!("the client `{name}` has {examples} examples: expected a finite number > 0");
                return Err(Error::Merge(problem));
            }
        }
        let (prior, posterior) = (Q::of_moments(prior)?, Q::of_moments(posterior)?);
        Ok(Server { method, round, prior, posterior, clients })
    }

    /// The same server with this posterior in place of the prior as the start. The duals know nothing of it: methods
    /// whose server is the prior times all duals forget it in the first round.
    ///
    /// # Errors
    /// Other parameters than the prior's.
    pub fn starting_at(self, posterior: &Q) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let moments = arranged(&self.prior.moments()?, posterior, "the start")?;
        Ok(Server { posterior: Q::of_moments(&moments)?, ..self })
    }

    /// The method and its settings.
    pub fn method(&self) -> Method {
        self.method
    }

    /// Number of updates so far.
    pub fn round(&self) -> u64 {
        self.round
    }

    /// p₀
    pub fn prior(&self) -> &Q {
        &self.prior
    }

    /// N(m_g, S_g⁻¹), what the server knows now. For methods with fixed precisions, only the mean is learned.
    pub fn posterior(&self) -> &Q {
        &self.posterior
    }

    /// Names of the clients, in order.
    pub fn clients(&self) -> impl Iterator<Item = &str> {
        self.clients.keys().map(String::as_str)
    }

    /// (v_k, V_k) of one client.
    pub fn dual(&self, client: &str) -> Option<&Dual> {
        self.clients.get(client).map(|c| &c.dual)
    }

    /// What one client has to minimize in this round.
    ///
    /// # Errors
    /// No client of that name.
    pub fn client(&self, name: &str) -> Result<Local<Q>> {
        let _no_grad = tch::no_grad_guard();
        let client = self.clients.get(name).ok_or_else(|| self.unknown(name))?;
        let state = self.state()?;
        let problem = self.method.rule().problem(&state, client);
        Local::new(
            (name.to_owned(), self.round),
            (client.examples, problem.ess),
            (Q::of_moments(&problem.prior)?, Q::of_moments(&state.posterior)?),
            problem.share,
        )
    }

    /// Ends a round with the answers of some or all clients, each the Gaussian that the client has learned from
    /// [`Server::client`] of this round.
    ///
    /// # Errors
    /// No answer, a client that is unknown or answers twice, other parameters than the prior's;
    /// [`Error::NotPositiveDefinite`] if the new posterior would have no positive precision: lower the method's
    /// damping, or for BayesADMM its ρ, or pass answers through [`clamp_information`](crate::clamp_information). The
    /// server is then as it was.
    pub fn update<'a, S: AsRef<str>>(&mut self, answers: impl IntoIterator<Item = (S, &'a Q)>) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let state = self.state()?;
        let rule = self.method.rule();
        // By name, whatever order they come in: sums of floating-point numbers know the order.
        let mut moments: BTreeMap<String, Moments> = BTreeMap::new();
        for (name, q) in answers {
            let name = name.as_ref();
            if !self.clients.contains_key(name) {
                return Err(self.unknown(name));
            }
            let q = arranged(&state.prior, q, &format!("the answer of client `{name}`"))?;
            if moments.insert(name.to_owned(), q).is_some() {
                return Err(Error::Merge(format!("round {}: the client `{name}` answers twice", self.round)));
            }
        }
        if moments.is_empty() {
            return Err(Error::Merge(format!("round {}: no client answers", self.round)));
        }
        let mut changed = BTreeMap::new();
        for (name, q) in &moments {
            changed.insert(name, rule.dual(&state, &self.clients[name], q).finite("dual")?);
        }
        let duals: Vec<&Dual> = self.clients.iter().map(|(name, c)| changed.get(name).unwrap_or(&c.dual)).collect();
        let answers: Vec<Answer> =
            moments.iter().map(|(name, q)| Answer { examples: self.clients[name].examples, q }).collect();
        let posterior = Q::of_moments(&rule.posterior(&state, &duals, &answers)?)?;
        // Nothing fails from here on.
        for (name, dual) in changed {
            self.clients.get_mut(name).expect("an answer of a client").dual = dual;
        }
        self.posterior = posterior;
        self.round += 1;
        Ok(())
    }

    fn state(&self) -> Result<State> {
        let prior = self.prior.moments()?;
        let posterior = arranged(&prior, &self.posterior, "the posterior")?;
        Ok(State { prior, posterior, examples: self.clients.values().map(|c| c.examples).sum() })
    }

    fn unknown(&self, name: &str) -> Error {
        let some: Vec<_> = self.clients().take(5).map(|c| format!("`{c}`")).collect();
        let more = if self.clients.len() > some.len() { ", …" } else { "" };
        Error::Merge(format!("there is no client `{name}`; the clients are {}{more}", some.join(", ")))
    }
}
