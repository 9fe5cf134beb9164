//! Passes over more weights than caches hold, which write around these: the same bits as smaller ones.

use support::bits;
use tch::{Device, Kind, Tensor};
use tch_blr::rule::Row;
use tch_blr::{Derivatives, Ivon, Labels, Params, Philox, Statistic, Von};

/// From as many weights on.
const LARGE: i64 = 1 << 23;

/// The first weights and states after two steps of a parameter with `n` of them, of gradients and squares that are the
/// same function of the position.
fn first<R: Row>(row: R, kind: Kind, n: i64) -> Vec<Vec<u8>> {
    let wave = |of: f64| (Tensor::arange(n, (Kind::Float, Device::Cpu)) * of).sin().to_kind(kind);
    let w = (wave(0.1) * 0.5).set_requires_grad(true);
    let squares = row.statistic() == Statistic::Fisher(Labels::Observed);
    let mut opt =
        row.builder().noise(Philox { seed: 7 }).build(Params::named([("w", w.shallow_clone())]).unwrap(), 0.1).unwrap();
    for step in 0..2 {
        let gradient = wave(0.3 + f64::from(step));
        let squares = squares.then(|| Some(gradient.square() + Tensor::from(0.1).to_kind(kind)));
        let given = Derivatives {
            loss: 1.0,
            examples: None,
            gradients: vec![Some(gradient)],
            squares: squares.into_iter().collect(),
        };
        opt.perturbed().unwrap().step(given).unwrap();
    }
    let state = R::STATE.iter().filter_map(|name| opt.state("w", name));
    let all = std::iter::once(w.detach()).chain(state);
    all.map(|t| bits(&t.narrow(0, 0, LARGE / 2 + 77).contiguous())).collect()
}

#[test]
fn what_goes_around_the_cache_arrives() {
    let (few, many) = (LARGE / 2 + 77, LARGE + 131);
    let ivon = Ivon::default().ess(1e4).hess_init(0.5).weight_decay(0.1);
    for kind in [Kind::Float, Kind::BFloat16] {
        assert!(first(ivon, kind, few) == first(ivon, kind, many), "{kind:?}");
    }
    // Its update writes to a variable that it does not read.
    let vogn = Von::vogn().ess(1e4).weight_decay(0.1);
    assert!(first(vogn, Kind::Float, few) == first(vogn, Kind::Float, many));
}
