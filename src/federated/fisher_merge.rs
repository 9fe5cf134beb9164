//! A mean of posteriors, weighted by their precisions.

use super::dual::Dual;
use super::method::{Answer, Client, Problem, Rule, SERVER, State};
use super::moments::Moments;
use crate::Result;
use serde::{Deserialize, Serialize};

/// The clients' natural parameters are averaged: a mean of weights by their precisions, as in Fisher merging.
///
/// ```text
/// client   q_k: the posterior under p₀ if all N examples were like its own,  min E_q[ (N/N_k) l_k ] + KL(q ‖ p₀)
/// dual     (v_k, V_k) = (N_k/N) ( λ(q_k) - λ(p₀) )
/// server   λ(g) = λ(p₀) + Σ_k (v_k, V_k)
///          S = Σ_k (N_k/N) S_k        S m = Σ_k (N_k/N) S_k m_k         once all clients have answered
/// ```
///
/// A client's q_k^(N_k/N) is its posterior under the share p₀^(N_k/N) of the prior, so that their product counts
/// the prior once. On quadratic losses this is the joint posterior after one round, as is that of [`PosteriorMerge`];
/// /// the two differ where a client is not trained to the end. Where data say little, steps from m_g are averaged,
/// whereas a product of posteriors over the prior adds up those of all K clients. The precision is positive whatever
/// the clients answer. With N_k in place of N it would be that of an average client, and the prior would count K times.
///
/// The rounds correct no answer, as no client knows what the others do; but all start at m_g, and may stop early.
///
/// Sources: Matena and Raffel, *Merging Models with Fisher-Weighted Averaging* (2022); for shares of the prior, Scott
/// et al., *Bayes and Big Data: The Consensus Monte Carlo Algorithm* (2016).
///
/// [`PosteriorMerge`]: super::PosteriorMerge
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct FisherMerge;

impl Rule for FisherMerge {
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    fn problem(&self, server: &State, _: &Client) -> Problem {
        Problem { ess: server.examples, prior: server.prior.times(1.0), share: Dual::zero(&server.prior) }
    }

    fn dual(&self, server: &State, client: &Client, answer: &Moments) -> Dual {
        let share = client.examples / server.examples;
        answer.natural().plus(-1.0, &server.prior.natural()).times(share)
    }

    fn posterior(&self, server: &State, duals: &[&Dual], _: &[Answer]) -> Result<Moments> {
        server.prior.natural().plus_all(duals.iter().copied()).moments(SERVER)
    }
}
