//! FedLap in its first form: weights only.

use super::dual::Dual;
use super::method::{Answer, Client, Problem, Rule, SERVER, State, check_damping};
use super::moments::Moments;
use crate::Result;
use serde::{Deserialize, Serialize};

/// FedLap: partitioned inference with every precision held at the prior's, so that only weights travel.
///
/// ```text
/// client   θ_k = argmin of l_k + v_kᵀθ + ½ ‖θ-w‖²_{S₀}
/// dual     v_k ← v_k + η S₀ (θ_k - w)
/// server   S₀ w = S₀m₀ + Σ_k v_k
/// ```
///
/// At the fixed point v_k = -∇l_k(w), so w minimizes Σ l_k + ½‖θ-m₀‖²_{S₀}. With S₀ = δI the paper's duals are v_k/δ.
/// The proximal term is squared, as in the paper; released code takes the norm itself. η should be near 1/K, or N_k/N
/// of the largest client: with η = 1 it can diverge. The form that also learns precisions is [`Pvi`](super::Pvi).
///
/// A client trains with any row, [`Adam`](crate::Adam) for example, and answers with [`Local::at`](super::Local::at)
/// its weights. Of an answer only the mean counts.
///
/// Source: Swaroop, Khan and Doshi-Velez, *Connecting Federated ADMM to Bayes* (ICLR 2025, arXiv 2501.17325).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FedLap {
    /// η in (0, 1], the share of the way that a dual goes in one round.
    pub damping: f64,
}

impl Rule for FedLap {
    fn validate(&self) -> Result<()> {
        check_damping(self.damping)
    }

    fn problem(&self, server: &State, client: &Client) -> Problem {
        let prior = server.prior.around(&server.posterior.mean);
        Problem { ess: client.examples, prior, share: client.dual.times(1.0) }
    }

    fn dual(&self, server: &State, client: &Client, answer: &Moments) -> Dual {
        // The precisions are equal and cancel: V_k stays 0.
        let [to, from] = [&answer.mean, &server.posterior.mean].map(|mean| server.prior.around(mean).natural());
        client.dual.plus(self.damping, &to.plus(-1.0, &from))
    }

    fn posterior(&self, server: &State, duals: &[&Dual], _: &[Answer]) -> Result<Moments> {
        server.prior.natural().plus_all(duals.iter().copied()).moments(SERVER)
    }
}
