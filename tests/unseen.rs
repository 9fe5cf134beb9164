//! `Builder::skip_unseen`: weights that no evaluation of a step speaks about are left alone. And padding, of which none
//! ever does.

use support::{F32, F64, Place, all_close, bits, params, refused, seeded, store, values, variable, weight};
use tch::nn::{EmbeddingConfig, LinearConfig, Module, VarStore};
use tch::{Kind, Tensor};
use tch_blr::rule::Row;
use tch_blr::{
    Adam, AdamW, Advice, BayesBiNN, BayesianSam, Builder, Evon, Expectation, FullVon, Ivon, Labels, NoisyKfac, Philox,
    RmsProp, Sam, SamRmsProp, Sgd, Statistic, Ste, Vadam, Von, nn,
};

/// Mean and state, to the bit.
fn kept<R: Row>(opt: &tch_blr::Optimizer<R>, w: &Tensor, element: i64) -> Vec<Vec<u8>> {
    let of = |t: &Tensor| bits(&t.detach().get(element));
    R::STATE.iter().filter_map(|name| opt.state("w", name)).map(|t| of(&t)).chain([of(w)]).collect()
}

/// Element 1 has no gradient for three steps, then one, then none. It stays as it is while it has none, and the others
/// move as without the option.
fn leaves_alone<R: Row>(place: Place, lr: f64, builder: impl Fn() -> Builder<R>) {
    let run = |skip: bool| {
        let vs = store(place);
        let w = variable(&vs, "w", 0, &Tensor::from_slice(&[0.5, -1.5, 2.0]).to_kind(place.0));
        let builder = builder().noise(Philox { seed: 3 });
        let mut opt = if skip { builder.skip_unseen() } else { builder }.build(&vs, lr).unwrap();
        let (mut path, mut others) = (vec![kept(&opt, &w, 1)], Vec::new());
        for factor in [0.0, 0.0, 0.0, 0.7, 0.0, 0.0] {
            let x = Tensor::from_slice(&[1.0, factor, -2.0]).to_kind(place.0);
            let target = Tensor::from_slice(&[0.3, 0.4, -0.2]).to_kind(place.0);
            opt.step(|| ((&w - &target).square() * x.square()).to_kind(Kind::Float)).unwrap();
            path.push(kept(&opt, &w, 1));
            others.push([0, 2].map(|i| kept(&opt, &w, i)));
        }
        (path, others)
    };
    let ((path, others), (usual, same)) = (run(true), run(false));
    assert!(path[..4].iter().all(|p| *p == path[0]), "{}: {path:?}", R::NAME);
    assert_ne!(path[4], path[3], "{}: it has been seen", R::NAME);
    assert!(path[5] == path[4] && path[6] == path[4], "{}: {path:?}", R::NAME);
    // From then on its noise is in the norm of all gradients.
    assert_eq!(others[..3], same[..3], "{}", R::NAME);
    // Which is what the option is for: the state of most rows moves without a gradient.
    if !["sgd", "sam"].contains(&R::NAME) {
        assert_ne!(usual[6], usual[4], "{}", R::NAME);
    }
}

#[test]
fn what_has_no_gradient_is_left_alone() {
    let ivon = || Ivon::default().ess(20.0).beta2(0.9).weight_decay(0.1);
    for place in [F64, F32, (Kind::BFloat16, tch::Device::Cpu)] {
        leaves_alone(place, 0.05, || Sgd::default().momentum(0.9).weight_decay(0.1).builder());
        leaves_alone(place, 0.05, || RmsProp::default().builder());
        leaves_alone(place, 0.05, || Adam::default().weight_decay(0.1).builder());
        leaves_alone(place, 0.05, || Adam::default().amsgrad(true).builder());
        leaves_alone(place, 0.05, || AdamW::default().builder());
        leaves_alone(place, 0.05, || ivon().builder());
        leaves_alone(place, 0.05, || ivon().expectation(Expectation::Antithetic { pairs: 2 }).builder());
        leaves_alone(place, 0.05, || ivon().hessian(Statistic::SquaredGradient).builder());
        leaves_alone(place, 0.01, || Ivon::auto(20.0, 30));
        leaves_alone(place, 0.05, || ivon().samples(2).builder().clip_grad_norm(0.1));
        leaves_alone(place, 0.05, || Von::vogn().ess(20.0).damping(0.1).builder());
        leaves_alone(place, 0.05, || Von::neurips2019().ess(20.0).weight_decay(0.1).builder());
        leaves_alone(place, 0.05, || Von::vogn().ess(20.0).hessian(Statistic::Price).builder());
        leaves_alone(place, 0.05, || BayesianSam::default().ess(20.0).builder());
        leaves_alone(place, 0.05, || Sam::default().momentum(0.9).weight_decay(0.1).builder());
        leaves_alone(place, 0.05, || SamRmsProp::default().builder());
        leaves_alone(place, 0.05, || Vadam::default().ess(20.0).builder());
        leaves_alone(place, 0.05, || Ste::default().momentum(0.9).builder());
        leaves_alone(place, 0.5, || BayesBiNN::default().ess(20.0).builder());
    }
}

/// Gradients of +1 and -1 add up to none, but have been there; and so have two examples whose gradients cancel.
#[test]
fn gradients_that_cancel_were_seen() {
    let moved = |mut opt: tch_blr::Optimizer<Ivon>, w: &Tensor, folder: Option<&std::path::Path>| {
        let before = kept(&opt, w, 0);
        opt.accumulate(|| w.sum(Kind::Double)).unwrap();
        if let Some(folder) = folder {
            let path = folder.join("between");
            opt.save(&path).unwrap();
            opt.load(&path).unwrap();
        }
        opt.step(|| -w.sum(Kind::Double)).unwrap();
        kept(&opt, w, 0) != before
    };
    let folder = tempfile::tempdir().unwrap();
    for at in [None, Some(folder.path())] {
        let w = weight(&[0.5]);
        let ivon = Ivon::default().ess(20.0).hessian(Statistic::SquaredGradient).square_scale(1e-9).beta2(0.9);
        let opt = ivon.noise(Philox { seed: 3 }).skip_unseen().build(params(&w), 0.1).unwrap();
        assert!(moved(opt, &w, at));
    }
    for rule in [Von::ogn(), Von::vogn()] {
        let w = weight(&[0.5]);
        let mut opt = rule.ess(20.0).builder().noise(Philox { seed: 3 }).skip_unseen().build(params(&w), 0.1).unwrap();
        let before = kept(&opt, &w, 0);
        opt.step(|| Tensor::from_slice(&[1.0, -1.0]) * &w).unwrap();
        assert_ne!(kept(&opt, &w, 0), before);
    }
}

/// A token that never occurs keeps the precision it started with, also without any prior; one that occurs in every
/// other batch learns from those. Without the option both lose theirs, and the noise has no bound.
#[test]
fn tokens_that_do_not_occur() {
    let run = |skip: bool| {
        let vs = VarStore::new(tch::Device::Cpu);
        let config = EmbeddingConfig::default();
        let _turn = seeded(1);
        let table = tch::nn::embedding(vs.root(), 4, 2, config);
        let row = Ivon::default().ess(100.0).hess_init(0.5).beta2(0.9).weight_decay(0.0).builder();
        let row = row.noise(Philox { seed: 2 });
        let mut opt = if skip { row.skip_unseen() } else { row }.build(&vs, 0.01).unwrap();
        for step in 0..400_i64 {
            let tokens = Tensor::from_slice(&[0, 1 + step % 2]);
            opt.step(|| table.forward(&tokens).square().sum(Kind::Float)).unwrap();
        }
        let sigma = values(&opt.posterior().unwrap().variance("weight").unwrap().sqrt());
        (sigma, opt.diagnostics().unwrap().advice())
    };
    let (sigma, advice) = run(true);
    // h₀ = ½, and the loss has the Hessian 2.
    all_close(&sigma[6..], &[1.0 / 50.0_f64.sqrt(); 2], 1e-6);
    assert!(sigma[..6].iter().all(|s| (0.04..0.12).contains(s)), "{sigma:?}");
    assert!(!advice.iter().any(|a| matches!(a, Advice::Unbounded { .. })), "{advice:?}");
    let (sigma, advice) = run(false);
    assert!(sigma[6..].iter().all(|s| *s > 1e3), "{sigma:?}");
    let [Advice::Unbounded { name, .. }] = &advice[..] else { panic!("{advice:?}") };
    assert_eq!(name, "weight");
    assert!(advice[0].to_string().contains("skip_unseen()") && advice[0].to_string().contains("weight_decay is 0"));
}

#[test]
fn rows_over_blocks_have_no_single_weights() {
    let vs = store(F64);
    let _w = variable(&vs, "w", 0, &Tensor::from_slice(&[1.0, 2.0]));
    refused(Evon::default().ess(9.0).builder().skip_unseen().build(&vs, 0.1), &["skip_unseen", "ties the weights"]);
    refused(FullVon::default().ess(9.0).builder().skip_unseen().build(&vs, 0.1), &["skip_unseen"]);
    refused(NoisyKfac::default().ess(9.0).builder().skip_unseen().build(&vs, 0.1), &["skip_unseen"]);
}

/// How much of h₀ is left is not the same in all weights any more.
#[test]
fn what_was_learned_is_not_known() {
    let w = weight(&[0.5]);
    let opt = Ivon::auto(20.0, 30).skip_unseen().build(params(&w), 0.1).unwrap();
    refused(opt.learned_posterior(), &["skip_unseen", "posterior()"]);
    opt.posterior().unwrap();
}

/// The padding token is a vector of zeros in training, in every sample of a posterior and in its mean, and in what
/// per-example gradients see.
#[test]
fn padding_is_zero_under_any_noise() {
    let mut vs = VarStore::new(tch::Device::Cpu);
    let _turn = seeded(1);
    let table = nn::embedding(vs.root(), 4, 3, EmbeddingConfig { padding_idx: 2, ..Default::default() });
    vs.set_kind(Kind::Double);
    let tokens = Tensor::from_slice(&[0_i64, 2, 2, 3, 1, 2]).reshape([2, 3]);
    let at_padding = |z: &Tensor| [z.get(0).get(1), z.get(0).get(2), z.get(1).get(2)].map(|t| values(&t));
    let zero = vec![0.0; 3];
    assert_eq!(values(&table.ws.get(2)), zero);
    for row in [Von::vogn().ess(10.0), Von::vogn().ess(10.0).hessian(Statistic::Fisher(Labels::Observed)).samples(2)] {
        let mut opt = row.builder().noise(Philox { seed: 4 }).build(&vs, 0.1).unwrap();
        for _ in 0..3 {
            opt.step(|| {
                let z = table.forward(&tokens);
                assert_eq!(at_padding(&z), [&zero; 3].map(Vec::clone));
                assert_ne!(values(&table.ws.get(2)), zero, "its row has noise");
                (z - 1.0).square().sum_dim_intlist([1, 2].as_slice(), false, None::<Kind>)
            })
            .unwrap();
        }
        assert_eq!(values(&table.ws.get(2)), zero, "the mean stays");
        let q = opt.posterior().unwrap();
        let outputs = q.predict_samples(&vs, 3, || table.forward(&tokens)).unwrap();
        (0..3).for_each(|k| assert_eq!(at_padding(&outputs.get(k)), [&zero; 3].map(Vec::clone)));
    }
}

/// Sentences of two to four words, padded to twelve, whose first word has the class. With noise on the padding, which
/// grows to the prior's or without bound, nothing can be learned of them; here IVON learns what Adam does.
#[test]
fn padded_sentences_are_learned() {
    let accuracy = |decay: Option<f64>| {
        let _turn = seeded(5);
        let integers = (Kind::Int64, tch::Device::Cpu);
        let tokens = Tensor::randint_low(1, 50, [200, 12], integers);
        let length = Tensor::randint_low(2, 5, [200, 1], integers);
        let tokens = &tokens * Tensor::arange(12, integers).unsqueeze(0).less_tensor(&length).to_kind(Kind::Int64);
        let y = tokens.select(1, 0).remainder(2);
        let vs = VarStore::new(tch::Device::Cpu);
        let config = EmbeddingConfig { padding_idx: 0, ..Default::default() };
        let table = nn::embedding(vs.root() / "table", 50, 16, config);
        let head = nn::linear(vs.root() / "head", 16, 2, LinearConfig::default());
        let forward = || head.forward(&table.forward(&tokens).sum_dim_intlist([1_i64].as_slice(), false, Kind::Float));
        let loss = || forward().cross_entropy_for_logits(&y);
        if let Some(decay) = decay {
            let ivon = Ivon::default().ess(200.0).hess_init(0.1).beta2(0.99).weight_decay(decay);
            let mut opt = ivon.builder().noise(Philox { seed: 1 }).build(&vs, 0.1).unwrap();
            (0..800).for_each(|_| _ = opt.step(loss).unwrap());
        } else {
            let mut opt = Adam::default().build(&vs, 1e-2).unwrap();
            (0..800).for_each(|_| _ = opt.step(loss).unwrap());
        }
        let right = forward().argmax(-1, false).eq_tensor(&y);
        right.to_kind(Kind::Double).mean(None::<Kind>).double_value(&[])
    };
    // Chance is .5.
    assert!([None, Some(1e-4), Some(0.0)].map(accuracy).iter().all(|a| *a > 0.7));
}
