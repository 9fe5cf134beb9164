//! Federated learning: clients that keep their data, and a server that only sees their posteriors.
//!
//! K clients have losses l_k (sums over their own examples). We want the posterior of all data under the prior
//! p₀ = N(m₀, S₀⁻¹),
//!
//! ```text
//! min over q of  Σ_k E_q[ l_k ] / τ + KL(q ‖ p₀)
//! ```
//!
//! At its minimum every client contributes a linear term v_k and a precision V_k to the natural parameters,
//!
//! ```text
//! S = S₀ + Σ_k V_k        V_k = E_q[∇²l_k]/τ
//! S m = S₀m₀ + Σ_k v_k    v_k = V_k m - E_q[∇l_k]/τ
//! ```
//!
//! These are the client's **dual** variables ([`Dual`]), or its site, in the words of partitioned inference. V_k may
//! have either sign, so a dual is no posterior. The server holds one for each client, and a posterior N(m_g, S_g⁻¹). A
//! round has three steps:
//!
//! 1. [`Server::client`] says what one client has to minimize ([`Local`]): its own loss, what the others know, as a
//!    Gaussian prior, and a correction for what this prior already holds of the client itself.
//! 2. The client trains with any row of the crate, and answers with a Gaussian N(m_k, S_k⁻¹).
//! 3. [`Server::update`] moves the duals of the clients that answered, then the posterior.
//!
//! The methods differ in little else than three numbers. With λ(q) = (S m, S) for the natural parameters of q,
//!
//! ```text
//! client   min over q of  (1/ρ) E_q[ l_k/τ + θᵀv_k - ½ θᵀV_kθ ] + KL(q ‖ N(m_g, S_g⁻¹))
//! dual     (v_k, V_k) ← (v_k, V_k) + ηρ ( λ(q_k) - λ(g) )
//! server   λ(g) ← (1-a) · mean of the λ(q_k) + a ( λ(p₀) + Σ_k (v_k, V_k) )
//! ```
//!
//! | method | ρ | η | a | S_k |
//! |---|---|---|---|---|
//! | [`FedAvg`]: the weights are averaged, there is no dual | | | | fixed |
//! | [`PosteriorMerge`]: the clients' posteriors over the prior | 1 | 1 | 1 | learned, always under p₀ |
//! | [`FisherMerge`]: the mean of the clients' natural parameters | 1 | 1 | 1 | learned, always under p₀; N for N_k |
//! | [`Pvi`]: partitioned variational inference | 1 | damping | 1 | learned |
//! | FedLap-Cov: [`Pvi`], answered by [`Local::laplace`] | 1 | damping | 1 | Laplace |
//! | [`FedLap`] | 1 | damping | 1 | fixed at S₀ |
//! | [`BayesAdmm`]; IVON-ADMM if clients train with [`Ivon`](crate::Ivon) | ρ | damping | 1/(1+Kρ) | learned |
//! | [`Admm`]: federated ADMM | ρ | 1 | as above | fixed, isotropic |
//!
//! ```
//! use tch::{Kind, Tensor, nn};
//! use tch_blr::federated::{BayesAdmm, Server};
//! use tch_blr::rows::StepLength;
//! use tch_blr::{DiagonalGaussian, Ivon, Params};
//! # fn main() -> tch_blr::Result<()> {
//! # tch::manual_seed(0);
//! let vs = nn::VarStore::new(tch::Device::Cpu);
//! let w = vs.root().zeros("w", &[2]);
//! let data = [("north", [1.0f32, 2.0]), ("south", [3.0, 2.0])]; // each client knows noisy values of w
//!
//! let prior = DiagonalGaussian::new([("w", Tensor::zeros([2], (Kind::Float, w.device())), Tensor::ones_like(&w))])?;
//! let method = BayesAdmm { rho: 0.5, damping: 1.0, temperature: 1.0 };
//! let mut server = Server::new(method, &prior, data.map(|(name, _)| (name, 50.0)))?;
//! for _ in 0..3 {
//!     let mut answers = Vec::new();
//!     for (name, y) in &data {
//!         let local = server.client(name)?;
//!         local.start(&vs)?;
//!         let ivon = Ivon::default().ess(local.ess()).beta2(0.98).step_length(StepLength::Adam { beta: 0.99 });
//!         let mut opt = ivon.prior(local.prior()).build(&vs, 0.02)?;
//!         let (params, y) = (Params::from(&vs), Tensor::from_slice(y));
//!         for _ in 0..500 {
//!             // The mean loss, and the correction.
//!             opt.step(|| Ok::<_, tch_blr::Error>((&w - &y).square().sum(Kind::Float) + local.correction(&params)?))?;
//!         }
//!         answers.push((*name, opt.posterior()?));
//!     }
//!     server.update(answers.iter().map(|(name, q)| (*name, q)))?;
//! }
//! let joint = server.posterior().mean("w").unwrap();
//! assert!((joint - 2.0).abs().max().double_value(&[]) < 0.2);
//! # Ok(())
//! # }
//! ```
//!
//! **Partial participation.** Any number of clients may answer in a round. The duals of the others stay, and still
//! count in Σ_k; the mean and K in a = 1/(1+Kρ) are those of the clients that answered. So a client that is away is
//! remembered by what it last said.
//!
//! **Transport.** [`Local::save`] and [`Local::load`] carry a client's task as a file, and the answer is the file of a
//! posterior ([`DiagonalGaussian::save`](crate::DiagonalGaussian::save)), so any way of moving files will do: a shared
//! folder, HTTP, or, between ranks, [`parallel::gather`](crate::parallel::gather) of their bytes. Clients that are
//! ranks need no task: each rank has the server, trains its own client and updates the server with all answers, and the
//! servers keep the same bits. [`Server::save`] keeps the server between rounds. An answer has to be to the task of the
//! present round ([`Local::round`]): the step of the dual is the distance from the posterior that the client was given.
//!
//! Sources: Swaroop, Khan and Doshi-Velez, *Connecting Federated ADMM to Bayes* (ICLR 2025, arXiv 2501.17325) for
//! FedLap and FedLap-Cov; *Federated ADMM from Bayesian Duality* (ICLR 2026, arXiv 2506.13150) for BayesADMM and
//! IVON-ADMM; Bui et al. (2018) and Ashman et al. (2022) for partitioned variational inference; McMahan et al. (2017)
//! for FedAvg.

mod admm;
mod bayes_admm;
mod dual;
mod fed_avg;
mod fed_lap;
mod file;
mod fisher_merge;
mod gaussian;
mod layout;
mod local;
mod merge;
mod method;
mod moments;
mod pvi;
mod server;

pub use admm::Admm;
pub use bayes_admm::BayesAdmm;
pub use dual::Dual;
pub use fed_avg::FedAvg;
pub use fed_lap::FedLap;
pub use fisher_merge::FisherMerge;
pub use gaussian::Gaussian;
pub use local::Local;
pub use merge::PosteriorMerge;
pub use method::Method;
pub use pvi::Pvi;
pub use server::Server;
