//! Training loops of other shapes than `opt.step(|| loss)`: what they bring out of a step, where their gradients come
//! from, what they leave out. That every row's steps are the same by each door is in tests/conformance.rs.

use std::cell::Cell;
use support::{F64, Net, bits, refused};
use tch::{Kind, Tensor};
use tch_blr::{AnyRow, Error, Ivon, Philox, Sam, Sgd};

/// The last of three samples, or the second of two points; and a step is what it is without an output.
#[test]
fn the_output_is_that_of_the_last_evaluation() {
    let calls = Cell::new(0);
    let counted = |net: &Net| {
        calls.set(calls.get() + 1);
        (net.losses(), calls.get())
    };
    let [net, other] = [0, 1].map(|_| Net::new(F64));
    let build =
        |net: &Net| Ivon::default().ess(100.0).samples(3).noise(Philox { seed: 1 }).build(&net.vs, 0.1).unwrap();
    let (mut opt, mut plain) = (build(&net), build(&other));
    for step in 1..3 {
        let (loss, call) = opt.step_with_output(|| counted(&net)).unwrap();
        assert_eq!((loss, call), (plain.step(|| other.losses()).unwrap(), 3 * step));
    }
    for (a, b) in net.weights.iter().zip(&other.weights) {
        assert_eq!(bits(a), bits(b));
    }
    calls.set(0);
    let (_, call) = Sam::default().build(&net.vs, 0.1).unwrap().step_with_output(|| counted(&net)).unwrap();
    assert_eq!(call, 2);
    // A row chosen at run time has the same method.
    calls.set(0);
    let mut opt = AnyRow::named("sgd").unwrap().build(&net.vs, 0.1).unwrap();
    let (loss, (call, size)) = opt
        .step_with_output(|| {
            let (losses, call) = counted(&net);
            let size = losses.size();
            Ok::<_, Error>((losses, (call, size)))
        })
        .unwrap();
    assert_eq!((call, size), (1, vec![12]));
    assert!(loss > 0.0);
}

/// The closure's own error comes through, once.
#[test]
fn a_closure_with_an_output_may_fail() {
    let net = Net::new(F64);
    let fails = || Err::<(Tensor, ()), _>(std::io::Error::other("no more data"));
    let mut opt = Sgd::default().build(&net.vs, 0.1).unwrap();
    let mut chosen = AnyRow::named("sgd").unwrap().build(&net.vs, 0.1).unwrap();
    for error in [opt.step_with_output(fails).unwrap_err(), chosen.step_with_output(fails).unwrap_err()] {
        let text = error.to_string();
        assert_eq!(text, "the closure failed: no more data");
        assert!(matches!(error, Error::Closure(e) if e.downcast_ref::<std::io::Error>().is_some()));
    }
    refused(opt.step_with_output(|| (net.losses().mean(Kind::Double).detach(), 1)), &["loss", "no graph"]);
    assert_eq!(opt.steps(), 0);
}
