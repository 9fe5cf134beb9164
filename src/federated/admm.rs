//! Federated ADMM.

use super::dual::Dual;
use super::method::{Answer, Client, Problem, Rule, SERVER, State};
use super::moments::Moments;
use crate::{Result, check};
use serde::{Deserialize, Serialize};

/// Federated ADMM over weights: [`BayesAdmm`](super::BayesAdmm) with a fixed, isotropic covariance.
///
/// ```text
/// client   θ_k = argmin of l_k + v_kᵀθ + ½ρ ‖θ-w‖²
/// dual     v_k ← v_k + ρ ( θ_k - w )
/// server   w = argmin of ½ ‖w-m₀‖²_{S₀} - wᵀ Σ_k v_k + ½ρ Σ_k ‖w-θ_k‖²
/// ```
///
/// For S₀ = δI the server's w is (1-δα) times the mean of the θ_k and α times the sum of S₀m₀ and the v_k, with α =
/// 1/(δ+Kρ). ρ is on the scale of the summed loss; BayesADMM's ρ is this one over δ. The last sum is over the clients
/// that answered. The server's precision stays that of the prior.
///
/// A client trains with any row and answers with [`Local::at`](super::Local::at) its weights. Of an answer only the
/// mean counts.
///
/// Sources: Boyd et al., *Distributed Optimization and Statistical Learning via ADMM* (2011), with the server's step as
/// in arXiv 2506.13150.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Admm {
    /// ρ > 0, the precision with which a client is held to the server's weights.
    pub rho: f64,
}

impl Rule for Admm {
    fn validate(&self) -> Result<()> {
        check::positive("rho", self.rho)
    }

    fn problem(&self, server: &State, client: &Client) -> Problem {
        let prior = server.posterior.isotropic(self.rho);
        Problem { ess: client.examples, prior, share: client.dual.times(1.0) }
    }

    fn dual(&self, server: &State, client: &Client, answer: &Moments) -> Dual {
        let [to, from] = [answer, &server.posterior].map(|q| q.isotropic(self.rho).natural());
        client.dual.plus(1.0, &to.plus(-1.0, &from))
    }

    fn posterior(&self, server: &State, duals: &[&Dual], answers: &[Answer]) -> Result<Moments> {
        let sites = server.prior.natural().plus_all(duals.iter().copied());
        let all: Vec<Dual> = answers.iter().map(|a| a.q.isotropic(self.rho).natural()).collect();
        let w = sites.plus_all(&all).moments(SERVER)?.mean;
        Ok(server.prior.around(&w))
    }
}
