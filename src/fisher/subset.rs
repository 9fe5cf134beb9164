//! The whole matrix of a Fisher information over some single weights, the others being known.

use super::at::{At, at, finite};
use super::full::add_outer_products;
use super::{Batch, Fisher};
use crate::{Error, IntoTensor, Params, Posterior, Result, check};
use tch::{Kind, Tensor};

/// Some single weights of a model, by parameter and by their position in it, in row-major order: a subnetwork
/// (Daxberger et al. 2021, *Bayesian Deep Learning via Subnetwork Inference*).
///
/// ```
/// # use tch::Tensor;
/// use tch_blr::{DiagonalGaussian, fisher::Subnetwork};
/// # fn main() -> tch_blr::Result<()> {
/// let t = |x: [f64; 3]| Tensor::from_slice(&x);
/// let q = DiagonalGaussian::new([("w", t([0.0; 3]), t([4.0, 1.0, 2.0]))])?;
/// let widest = Subnetwork::of_largest_variance(&q, 2)?;
/// assert_eq!(widest.of("w"), Some(&[1, 2][..]));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subnetwork {
    /// Ascending positions.
    of: Vec<(String, Vec<i64>)>,
}

impl Subnetwork {
    /// From the name of each parameter and positions in it, in any order.
    ///
    /// # Errors
    /// No position at all, a name or a position twice, a negative one.
    pub fn new<S: Into<String>>(of: impl IntoIterator<Item = (S, Vec<i64>)>) -> Result<Self> {
        let mut all: Vec<(String, Vec<i64>)> = Vec::new();
        for (name, mut positions) in of {
            let name = name.into();
            positions.sort_unstable();
            if let Some([twice, _]) = positions.windows(2).find(|pair| pair[0] == pair[1]) {
                return Err(Error::parameter(&name, format!("its weight {twice} was chosen twice")));
            }
            if let Some(negative) = positions.first().filter(|p| **p < 0) {
                return Err(Error::parameter(&name, format!("its weight {negative} was chosen: they count from 0")));
            }
            if all.iter().any(|(known, _)| *known == name) {
                return Err(Error::parameter(&name, "it was named twice; give all of its weights at once"));
            }
            if !positions.is_empty() {
                all.push((name, positions));
            }
        }
        if all.is_empty() {
            return Err(Error::Parameters("a subset of no weights was asked for; choose at least one".to_owned()));
        }
        Ok(Subnetwork { of: all })
    }

    /// The k weights of the largest variance in a posterior, of which a diagonal one will do: those that the data say
    /// least about. Of equal ones the first.
    ///
    /// # Errors
    /// k that is 0 or more than the posterior's weights; a variance that is not a number.
    pub fn of_largest_variance(q: &dyn Posterior, k: usize) -> Result<Self> {
        check::that("k", k, (1..=q.len()).contains(&k), "at least 1 and at most the number of weights")?;
        let mut all: Vec<(f64, usize, i64)> = Vec::with_capacity(q.len());
        let names: Vec<&str> = q.names().collect();
        for (parameter, name) in names.iter().enumerate() {
            let variance =
                q.variance(name).ok_or_else(|| Error::parameter(name, "the posterior has no variance of it"))?;
            let values = Vec::<f64>::try_from(variance.f_to_kind(Kind::Double)?.f_reshape([-1])?)?;
            if let Some(bad) = values.iter().find(|v| v.is_nan() || **v < 0.0) {
                return Err(Error::parameter(name, format!("a variance is {bad}: expected a number ≥ 0")));
            }
            all.extend((0..).zip(values).map(|(position, v)| (v, parameter, position)));
        }
        // Stable, so that of equal variances the first are taken.
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        let of = names.iter().enumerate().map(|(parameter, name)| {
            let here = all[..k].iter().filter(|w| w.1 == parameter).map(|w| w.2).collect();
            ((*name).to_owned(), here)
        });
        Subnetwork::new(of)
    }

    /// Number of weights.
    pub fn len(&self) -> usize {
        self.of.iter().map(|(_, positions)| positions.len()).sum()
    }

    /// Never: there is at least one.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Positions in one parameter, ascending.
    pub fn of(&self, name: &str) -> Option<&[i64]> {
        self.of.iter().find_map(|(n, positions)| (n == name).then_some(&positions[..]))
    }

    /// Names of the parameters that they belong to.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.of.iter().map(|(name, _)| name.as_str())
    }

    /// Their places `[k]` among the weights of all parameters, one after the other, in that order.
    fn places(&self, params: &Params) -> Result<Tensor> {
        let mut first = 0;
        let mut places = Vec::with_capacity(self.len());
        for leaf in params.leaves() {
            let n = leaf.tensor.numel() as i64;
            let mut named = self.of.iter().filter(|(name, _)| leaf.names.contains(name));
            for (name, positions) in named.by_ref().take(1) {
                if let Some(beyond) = positions.iter().find(|p| **p >= n) {
                    return Err(Error::parameter(name, format!("its weight {beyond} was chosen, and it has {n}")));
                }
                places.extend(positions.iter().map(|p| first + p));
            }
            if let Some((name, _)) = named.next() {
                let problem = format!("it is tied to `{}`; give all of its weights by one of its names", leaf.name());
                return Err(Error::parameter(name, problem));
            }
            first += n;
        }
        if let Some(unknown) = self.names().find(|name| params.find(name).is_none()) {
            return Err(Error::parameter(unknown, "weights of it were chosen, and the model does not train it"));
        }
        Ok(Tensor::from_slice(&places))
    }
}

impl Fisher {
    /// The whole matrix over some single weights, F_AA, with the others known: for a net that is too large for
    /// [`Fisher::full`]. Memory: 8k² bytes for k weights, and a chunk of gradients.
    ///
    /// # Errors
    /// As [`Fisher::full`] for as many weights; weights that the model does not have or train.
    pub fn subset<B: Into<Batch>, L: IntoTensor>(
        &self,
        params: impl Into<Params>,
        weights: &Subnetwork,
        batches: impl IntoIterator<Item = B>,
        model: impl Fn(&Tensor) -> L,
    ) -> Result<SubsetFisher> {
        // Only the parameters that they are in: nothing is differentiated by the others.
        let params = Params::separate(params)?.only_named(weights.names())?;
        params.check()?;
        let solution = params.at_present();
        self.check_matrix(weights.len())?;
        let device = solution.leaves().first().map_or(tch::Device::Cpu, |l| l.tensor.device());
        let places = weights.places(&solution)?.to_device(device);
        let mut matrix = Tensor::f_zeros([weights.len() as i64; 2], (Kind::Double, device))?;
        let seen = self.each(&params, batches, model, |batch, columns| {
            let add = |g: Tensor| add_outer_products(&mut matrix, &g.f_index_select(1, &places)?);
            batch.each_gradient(columns.len(), |c| columns.get(c), add)
        })?;
        finite("the chosen weights", &matrix, seen.examples)?;
        Ok(SubsetFisher { at: At { solution, seen, fisher: self.clone() }, weights: weights.clone(), places, matrix })
    }
}

/// The Fisher information matrix over some single weights, from [`Fisher::subset`]: a sum over
/// [`SubsetFisher::examples`] examples.
#[derive(Debug)]
pub struct SubsetFisher {
    at: At,
    weights: Subnetwork,
    places: Tensor,
    matrix: Tensor,
}

at!(SubsetFisher);

impl SubsetFisher {
    /// Which weights.
    pub fn weights(&self) -> &Subnetwork {
        &self.weights
    }

    /// F_AA `[k, k]` in f64: the parameters in order, of each the chosen weights by position.
    pub fn matrix(&self) -> &Tensor {
        &self.matrix
    }

    /// Their places among the weights of [`SubsetFisher::names`], one after the other.
    pub(crate) fn places(&self) -> &Tensor {
        &self.places
    }
}
