//! Partitioned variational inference.

use super::dual::Dual;
use super::method::{Answer, Client, Problem, Rule, SERVER, State, check_damping};
use super::moments::Moments;
use crate::Result;
use serde::{Deserialize, Serialize};

/// Partitioned variational inference: the posterior is the prior times one site for each client.
///
/// ```text
/// client   q_k: the posterior of l_k under the cavity, λ = λ(g) - (v_k, V_k)
/// site     (v_k, V_k) ← (v_k, V_k) + η ( λ(q_k) - λ(g) )
/// server   λ(g) = λ(p₀) + Σ_k (v_k, V_k)
/// ```
///
/// Its fixed points are those of variational inference on all data. With η = 1 and one client in each round it is the
/// sequential form; with all clients at once they all correct the same error, so η has to be near 1/K. At η ≤ 1/K, and
/// a server that starts at p₀, the precision stays positive whatever the clients answer. The site is the whole of what
/// a client contributes, so start the server at the prior.
///
/// With Laplace's approximation as the answer ([`Local::laplace`](super::Local::laplace)) this is **FedLap-Cov**:
///
/// ```text
/// client   θ_k = argmin of l_k + v_kᵀθ - ½ θᵀV_kθ + ½ ‖θ-m_g‖²_{S_g}       S_k = H_k(θ_k) - V_k + S_g
/// dual     v_k ← v_k + η ( S_kθ_k - S_g m_g )      V_k ← (1-η) V_k + η H_k
/// server   S_g = S₀ + Σ V_k                        S_g m_g = S₀m₀ + Σ v_k
/// ```
///
/// with diagonal H_k or full ones. The proximal term is squared, as in the paper.
///
/// Sources: Ashman et al., *Partitioned Variational Inference* (2022) and Bui et al. (2018); Swaroop, Khan and
/// Doshi-Velez (arXiv 2501.17325) for FedLap-Cov.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pvi {
    /// η in (0, 1], the share of the way that a site goes in one round.
    pub damping: f64,
}

impl Rule for Pvi {
    fn validate(&self) -> Result<()> {
        check_damping(self.damping)
    }

    fn problem(&self, server: &State, client: &Client) -> Problem {
        Problem { ess: client.examples, prior: server.posterior.times(1.0), share: client.dual.times(1.0) }
    }

    fn dual(&self, server: &State, client: &Client, answer: &Moments) -> Dual {
        client.dual.plus(self.damping, &answer.natural().plus(-1.0, &server.posterior.natural()))
    }

    fn posterior(&self, server: &State, duals: &[&Dual], _: &[Answer]) -> Result<Moments> {
        server.prior.natural().plus_all(duals.iter().copied()).moments(SERVER)
    }
}
