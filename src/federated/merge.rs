//! Posteriors multiplied, and the prior counted once.

use super::dual::Dual;
use super::method::{Answer, Client, Problem, Rule, SERVER, State};
use super::moments::Moments;
use crate::Result;
use serde::{Deserialize, Serialize};

/// The product of the clients' posteriors, divided by all but one of their priors.
///
/// ```text
/// client   q_k: the posterior of l_k under p₀, started at m_g
/// dual     (v_k, V_k) = λ(q_k) - λ(p₀)
/// server   λ(g) = λ(p₀) + Σ_k (v_k, V_k) = Σ_k λ(q_k) - (K-1) λ(p₀)
/// ```
///
/// This is [`merge::federated`](crate::merge::federated), kept over rounds. It is exact after one round if the clients'
/// posteriors are, and otherwise the rounds do not correct it: each client sees its own data alone, whatever the others
/// know, and only starts nearer. An answer of less precision than the prior's may leave no posterior;
/// [`clamp_information`](crate::clamp_information) is for that.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PosteriorMerge;

impl Rule for PosteriorMerge {
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    fn problem(&self, server: &State, client: &Client) -> Problem {
        Problem { ess: client.examples, prior: server.prior.times(1.0), share: Dual::zero(&server.prior) }
    }

    fn dual(&self, server: &State, _: &Client, answer: &Moments) -> Dual {
        answer.natural().plus(-1.0, &server.prior.natural())
    }

    fn posterior(&self, server: &State, duals: &[&Dual], _: &[Answer]) -> Result<Moments> {
        server.prior.natural().plus_all(duals.iter().copied()).moments(SERVER)
    }
}
