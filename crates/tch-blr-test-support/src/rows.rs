//! The rows under test, with settings under which all of their arithmetic takes part.

use crate::models::{Form, Net, Separable};
use crate::places::{Place, wave_at};
use tch::nn::VarStore;
use tch::{Device, Kind};
use tch_blr::rule::Row;
use tch_blr::{
    Adam, AdamW, BayesBiNN, BayesianSam, Builder, DiagonalGaussian, DiagonalNewton, Evon, Expectation, FullVon, Ivon,
    Labels, Newton, NoisyKfac, Params, Philox, Prior, RmsProp, Sam, SamRmsProp, Schedule, Sgd, Soap, Statistic, Ste,
    Vadam, Von,
};

/// A row's settings for the variables of a store, and a learning rate with which it trains [`Net`].
#[derive(Debug)]
pub struct Case<R: Row> {
    pub make: fn(&VarStore) -> Builder<R>,
    pub lr: f64,
    /// Of the models that it can train.
    pub form: Form,
}

impl<R: Row> Case<R> {
    pub fn builder(&self, vs: &VarStore) -> Builder<R> {
        (self.make)(vs).noise(Philox { seed: 11 })
    }

    pub fn net(&self, place: Place) -> Net {
        self.net_at(place, 0.0)
    }

    /// `phase` chooses the initial weights.
    pub fn net_at(&self, place: Place, phase: f64) -> Net {
        Net::of(self.form, place, phase)
    }

    pub fn separable(&self, place: Place) -> Separable {
        Separable::of(self.form, place)
    }
}

const ESS: f64 = 1e4;

/// A posterior for every variable of the store, as yesterday's task would leave it.
pub fn posterior(vs: &VarStore) -> DiagonalGaussian {
    let variables = vs.variables();
    let params = Params::from(vs);
    let entry = |(i, name): (usize, &str)| {
        let w = &variables[name];
        let place = (if w.kind() == Kind::Double { Kind::Double } else { Kind::Float }, Device::Cpu);
        (
            name.to_owned(),
            wave_at(&w.size(), i as f64, place) * 0.2,
            (wave_at(&w.size(), 9.0, place) + 2.0) * (0.01 * ESS),
        )
    };
    DiagonalGaussian::new(params.names().enumerate().map(entry)).unwrap()
}

fn prior(vs: &VarStore) -> Prior {
    Prior::from(posterior(vs)).elsewhere(0.01)
}

macro_rules! rows {
    ($form:ident: $($row:ident: $rule:ty = $make:expr, $lr:expr;)*) => {
        $(pub fn $row() -> Case<$rule> {
            Case { make: $make, lr: $lr, form: Form::$form }
        })*
    };
}

rows! { Plain:
    sgd: Sgd = |_| Sgd::default().builder(), 0.1;
    sgd_nesterov: Sgd = |_| Sgd::default().momentum(0.9).nesterov(true).weight_decay(0.01).builder(), 0.02;
    sgd_prior: Sgd = |vs| Sgd::default().momentum(0.5).dampening(0.1).ess(ESS).prior(prior(vs)), 0.1;
    rmsprop: RmsProp = |_| RmsProp::default().centered(true).momentum(0.5).weight_decay(1e-3).builder(), 0.005;
    adam: Adam = |_| Adam::default().weight_decay(1e-3).builder(), 0.02;
    adam_amsgrad: Adam = |_| Adam::default().amsgrad(true).builder().clip_grad_norm(5.0), 0.02;
    adam_prior: Adam = |vs| Adam::default().ess(ESS).prior(prior(vs)), 0.02;
    adamw: AdamW = |_| AdamW::default().builder(), 0.02;
    vadam: Vadam = |_| Vadam::default().ess(ESS).weight_decay(1e-2).samples(2).builder(), 0.03;
    vprop: Vadam = |_| Vadam::vprop().ess(ESS).square_init(0.1).builder(), 0.04;
    noisy_adam: Vadam = |vs| Vadam::noisy_adam().ess(ESS).damping(0.1).prior(prior(vs)), 0.03;
    ogn: Von = |_| Von::ogn().ess(ESS).beta2(0.9).builder(), 0.1;
    vogn: Von = |_| Von::vogn().ess(ESS).beta2(0.9).builder().clip_grad_value(10.0), 0.1;
    neurips2019: Von = |_| Von::neurips2019().ess(ESS).warmup_steps(5).augmentation(2.0).builder(), 0.005;
    von_price: Von = |_| Von::vogn().hessian(Statistic::Price).expectation(Expectation::Antithetic { pairs: 1 })
        .ess(ESS).damping(0.1).temperature(0.5).builder(), 0.1;
    ivon: Ivon = |_| Ivon::default().ess(ESS).hess_init(0.5).beta2(0.99).builder(), 0.2;
    ivon_gradsq: Ivon = |_| Ivon::default().ess(ESS).hessian(Statistic::SquaredGradient).square_scale(12.0)
        .beta2(0.99).clip_radius(1.0).builder(), 0.2;
    ivon_antithetic: Ivon = |_| Ivon::default().ess(ESS).expectation(Expectation::Antithetic { pairs: 1 }).samples(2).beta2(0.99).debias(false)
        .builder(), 0.2;
    ivon_auto: Ivon = |_| Ivon::auto(ESS, 200).map(|c| c.samples(2)).schedule(Schedule::Constant), 0.05;
    vogn_auto: Von = |_| Von::auto(ESS, 200).schedule(Schedule::Constant), 0.05;
    bsam_auto: BayesianSam = |_| BayesianSam::auto(ESS, 200).schedule(Schedule::Constant), 0.05;
    ivon_auto_prior: Ivon = |vs| Ivon::auto(ESS, 200).prior(prior(vs)).schedule(Schedule::Constant), 0.05;
    ste: Ste = |_| Ste::default().momentum(0.5).builder(), 0.05;
    bayesbinn: BayesBiNN = |_| BayesBiNN::default().ess(100.0).builder(), 0.01;
    bayesbinn_antithetic: BayesBiNN = |_| BayesBiNN::default().ess(100.0).expectation(Expectation::Antithetic { pairs: 1 }).samples(2).relaxation(0.5)
        .prior_natural(0.3).debias(false).builder(), 0.01;
    ivon_prior: Ivon = |vs| Ivon::default().ess(ESS).rescale_lr(false).samples(4).prior(prior(vs)), 0.008;
    sam: Sam = |_| Sam::default().weight_decay(1e-3).builder(), 0.02;
    sam_prior: Sam = |vs| Sam::default().momentum(0.0).ess(ESS).prior(prior(vs)).clip_grad_norm(5.0), 0.3;
    sam_rmsprop: SamRmsProp = |_| SamRmsProp::default().weight_decay(1e-3).builder(), 0.01;
    bsam: BayesianSam = |_| BayesianSam::iclr2023().ess(ESS).rho(0.05).beta2(0.9).builder(), 0.1;
    bsam_released: BayesianSam = |_| BayesianSam::released().ess(ESS).beta2(0.9).builder().clip_grad_value(10.0), 0.1;
    bsam_prior: BayesianSam = |vs| BayesianSam::default().ess(ESS).prior(prior(vs)), 0.02;
}

// Rows over blocks.
rows! { Tapped:
    newton: Newton = |_| Newton::default().ess(1e3).weight_decay(0.1).builder(), 0.5;
    newton_averaged: Newton = |_| Newton::default().ess(1e3).weight_decay(0.1).hess_init(1.0).beta2(0.5).builder(), 0.5;
    newton_prior: Newton = |vs| {
        let q = posterior(vs).full().unwrap();
        Newton::default().ess(1e3).prior(Prior::from(&q).elsewhere(0.01))
    }, 0.5;
    diagonal_newton: DiagonalNewton = |_| DiagonalNewton::default().ess(1e3).weight_decay(0.1).builder(), 0.3;
    hutchinson: DiagonalNewton = |_| DiagonalNewton::default().ess(1e3).weight_decay(0.1).hess_init(1.0).beta2(0.9)
        .hessian(Statistic::Hutchinson { probes: 2 }).builder(), 0.2;
    full_von: FullVon = |_| FullVon::default().ess(1e3).weight_decay(0.01).beta2(0.99)
        .expectation(Expectation::Antithetic { pairs: 4 }).builder(), 0.1;
    full_von_exact: FullVon = |_| FullVon::default().ess(1e3).weight_decay(0.01).hessian(Statistic::Hessian)
        .expectation(Expectation::Antithetic { pairs: 1 }).builder(), 0.3;
    full_von_prior: FullVon = |vs| FullVon::default().ess(1e3).hessian(Statistic::Hessian).prior(prior(vs)), 0.3;
    evon_auto: Evon = |_| Evon::auto(1e3, 200).map(|c| c.frequency(3)).schedule(Schedule::Constant), 0.03;
    evon: Evon = |_| Evon::default().ess(1e3).weight_decay(0.01).beta1(0.8).frequency(2).builder(), 0.2;
    evon_published: Evon = |_| Evon::published().ess(1e3).beta2(0.9).merge_dims(true).rotate_vectors(true).max_dim(12)
        .frequency(3).builder(), 0.02;
    evon_limit: Evon = |_| Evon::default().expectation(Expectation::Delta).beta2(0.9).hess_clip(4.0).frequency(2)
        .builder(), 0.05;
    evon_prior: Evon = |vs| Evon::default().ess(1e3).beta1(0.8).beta2(0.99).prior(prior(vs)), 0.1;
    soap: Soap = |_| Soap::default().ess(1e3).weight_decay(0.01).frequency(2).builder(), 0.05;
    noisy_kfac: NoisyKfac = |_| NoisyKfac::default().ess(1e3).weight_decay(0.01).frequency(2).builder(), 0.2;
    noisy_kfac_exact: NoisyKfac = |_| NoisyKfac::default().ess(1e3).weight_decay(0.01).labels(Labels::Exact)
        .split_damping(false).damping(0.1).samples(2).builder(), 0.2;
    noisy_kfac_prior: NoisyKfac = |vs| NoisyKfac::default().ess(1e3).prior(prior(vs)), 0.1;
    kfac: NoisyKfac = |_| NoisyKfac::default().ess(1e3).weight_decay(0.1).labels(Labels::Observed)
        .expectation(Expectation::Delta).builder(), 0.05;
}

/// Names of the rows that learn each weight, or each block, by itself, for a macro that takes them all.
#[macro_export]
macro_rules! rows_of_weights {
    ($all:ident) => {
        $all! {
            sgd sgd_nesterov sgd_prior rmsprop adam adam_amsgrad adam_prior adamw
            vadam vprop noisy_adam
            ogn vogn neurips2019 von_price ivon ivon_gradsq ivon_antithetic ivon_prior
            ivon_auto vogn_auto bsam_auto ivon_auto_prior
            sam sam_prior sam_rmsprop bsam bsam_released bsam_prior
            evon evon_published evon_limit evon_prior evon_auto soap noisy_kfac noisy_kfac_exact noisy_kfac_prior kfac
        }
    };
}

/// Of those with one block of all weights.
#[macro_export]
macro_rules! rows_of_all_weights {
    ($all:ident) => {
        $all! { newton newton_averaged newton_prior diagonal_newton hutchinson full_von full_von_exact full_von_prior }
    };
}

/// Of those that learn binary weights.
#[macro_export]
macro_rules! rows_of_binary_weights {
    ($all:ident) => {
        $all! { ste bayesbinn bayesbinn_antithetic }
    };
}
