//! BayesADMM, which is IVON-ADMM if the clients train with IVON.

use super::dual::Dual;
use super::method::{Answer, Client, Problem, Rule, SERVER, State, check_damping};
use super::moments::Moments;
use crate::{Result, check};
use serde::{Deserialize, Serialize};

/// The alternating direction method of multipliers, with natural parameters in place of weights.
///
/// ```text
/// client   min over q of  (1/ρ) E_q[ l_k/τ + θᵀv_k - ½ θᵀV_kθ ] + KL(q ‖ N(m_g, S_g⁻¹))
/// dual     (v_k, V_k) ← (v_k, V_k) + ηρ ( λ(q_k) - λ(g) )
/// server   λ(g) = (1-a) · mean of the λ(q_k) + a ( λ(p₀) + Σ_k (v_k, V_k) )        a = 1/(1+Kρ)
/// ```
///
/// A fixed point is the variational posterior of all data at the temperature τ, whatever ρ and η. On quadratic losses
/// with η = 1 the duals are exact after one round, and the server's error shrinks by 1-a in every further one; with
/// ρ = 1/K and a server that starts at the prior there is none after the first. On other losses a smaller ρ
/// lets clients go further in a round, and a smaller η keeps noise out of the duals.
///
/// With [`Ivon`](crate::Ivon): `.ess(local.ess())`, `.prior(local.prior())`, and [`Local::correction`] added to the
/// mean loss. IVON then starts at N(m_g, S_g⁻¹), with h = 0, which h + δ > 0 lets fall below zero. Released code adds
/// v - Vm to the gradient and takes V off the estimate of the Hessian, in an optimizer of its own; the correction has
/// both as its gradient and its share of Price's estimate, so any row can be the client.
///
/// Sources: *Federated ADMM from Bayesian Duality* (ICLR 2026, arXiv 2506.13150).
///
/// [`Local::correction`]: super::Local::correction
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BayesAdmm {
    /// ρ > 0: how strongly a client is held to the server's posterior.
    pub rho: f64,
    /// η in (0, 1], the share of the step that a dual takes.
    pub damping: f64,
    /// τ > 0: the clients' losses are divided by it. 1 is Bayes, less is a colder posterior.
    pub temperature: f64,
}

impl Rule for BayesAdmm {
    fn validate(&self) -> Result<()> {
        check::positive("rho", self.rho)?;
        check_damping(self.damping)?;
        check::positive("temperature", self.temperature)
    }

    fn problem(&self, server: &State, client: &Client) -> Problem {
        let ess = client.examples / (self.temperature * self.rho);
        Problem { ess, prior: server.posterior.times(1.0), share: client.dual.times(1.0 / self.rho) }
    }

    fn dual(&self, server: &State, client: &Client, answer: &Moments) -> Dual {
        let step = answer.natural().plus(-1.0, &server.posterior.natural());
        client.dual.plus(self.damping * self.rho, &step)
    }

    fn posterior(&self, server: &State, duals: &[&Dual], answers: &[Answer]) -> Result<Moments> {
        let k = answers.len() as f64;
        let a = 1.0 / (1.0 + k * self.rho);
        let sites = server.prior.natural().plus_all(duals.iter().copied());
        let answers = answers.iter().fold(sites.times(a), |sum, answer| sum.plus((1.0 - a) / k, &answer.q.natural()));
        answers.moments(SERVER)
    }
}
