//! Rows chosen at run time: every name builds what it says, and what is not known is refused with what is.

use support::{F64, Form, Net, bits};
use tch::{Kind, Tensor};
use tch_blr::{AnyRow, BuildOptions, DiagonalGaussian, Error, Ivon, Philox, Prior, Schedule, Statistic, Train, Von};

/// A row by its name, with an effective sample size where it has one. Five examples do not determine all weights, so
/// Newton's Hessian needs the damping.
fn row(name: &str) -> AnyRow {
    let default = serde_json::to_value(AnyRow::named(name).unwrap()).unwrap();
    let text = match name {
        "newton" => r#"{"newton": {"ess": 1000.0, "weight_decay": 0.1}}"#.to_owned(),
        _ if default[name].get("ess").is_some() => format!(r#"{{"{name}": {{"ess": 1000.0}}}}"#),
        _ => format!(r#""{name}""#),
    };
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"))
}

fn net(name: &str) -> Net {
    let blocks = ["newton", "diagonal_newton", "full_von", "evon", "soap", "noisy_kfac"].contains(&name);
    Net::of(if blocks { Form::Tapped } else { Form::Plain }, F64, 0.0)
}

fn options() -> BuildOptions {
    BuildOptions { noise: Some(Philox { seed: 3 }.into()), ..BuildOptions::default() }
}

#[test]
fn every_name_is_a_row_with_its_defaults() {
    assert_eq!(AnyRow::NAMES.len(), 18);
    for name in AnyRow::NAMES {
        let named = AnyRow::named(name).unwrap();
        assert_eq!(named.name(), *name);
        for text in [format!(r#""{name}""#), format!(r#"{{"{name}": {{}}}}"#)] {
            assert_eq!(serde_json::from_str::<AnyRow>(&text).unwrap(), named, "{text}");
        }
        let text = serde_json::to_string(&row(name)).unwrap();
        assert_eq!(serde_json::from_str::<AnyRow>(&text).unwrap(), row(name), "{text}");
    }
    assert!(AnyRow::named("momentum").is_none());
    let von: AnyRow = serde_json::from_str(r#"{"von": {"ess": 10.0, "hessian": {"Fisher": "Exact"}}}"#).unwrap();
    let expected = Von::default().ess(10.0).hessian(Statistic::Fisher(tch_blr::Labels::Exact));
    assert_eq!(von, AnyRow::from(expected));
}

#[test]
fn what_is_not_known_is_refused_with_what_is() {
    let refused = |text: &str, known: &[&str]| {
        let e = serde_json::from_str::<AnyRow>(text).unwrap_err().to_string();
        for part in known {
            assert!(e.contains(part), "{text}: {e}");
        }
    };
    refused(r#""ivonn""#, &["ivonn", "`sgd`", "`ivon`", "`noisy_kfac`"]);
    refused(r#"{"ivonn": {}}"#, &["ivonn", "`sgd`", "`ivon`", "`noisy_kfac`"]);
    refused(r#"{"ivon": {"esss": 1.0}}"#, &["esss", "`ess`", "`hess_init`"]);
    refused(r#"{"ivon": {"lr": 0.1}}"#, &["`lr`"]);
    refused(r#"{"ivon": {"ess": "many"}}"#, &["many"]);
    refused("3", &["the name of a row"]);
    // Values are checked when the optimizer is built.
    let row: AnyRow = serde_json::from_str(r#"{"ivon": {"ess": -1.0}}"#).unwrap();
    let net = net("ivon");
    assert!(matches!(row.build(&net.vs, 0.1), Err(Error::HyperParameter { name: "ess", .. })));
}

#[test]
fn every_row_trains_saves_and_resumes_behind_the_trait() {
    let dir = tempfile::tempdir().unwrap();
    for name in AnyRow::NAMES {
        let path = dir.path().join(name);
        let (ours, theirs) = (net(name), net(name));
        let mut opt = row(name).build_with(options(), &ours.vs, 0.01).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!((opt.name(), opt.steps(), opt.lr()), (*name, 0, 0.01));
        let train = |opt: &mut dyn Train, net: &Net| {
            opt.step(&mut || Ok(net.losses())).unwrap();
            opt.accumulate(&mut || Ok(net.losses_of(0, 5))).unwrap();
            opt.step_chunks(2, &mut |k| Ok(net.losses_of(6 * k as i64, 6))).unwrap();
        };
        train(&mut *opt, &ours);
        opt.save(&path).unwrap();
        let mut other = row(name).build(&theirs.vs, 0.5).unwrap();
        other.load(&path).unwrap();
        assert_eq!((other.steps(), other.lr()), (2, 0.01), "{name}");
        other.set_schedule(Schedule::Step { every: 1, factor: 0.5 }).unwrap();
        opt.set_schedule(Schedule::Step { every: 1, factor: 0.5 }).unwrap();
        train(&mut *opt, &ours);
        train(&mut *other, &theirs);
        let weights = |net: &Net| net.weights.iter().map(bits).collect::<Vec<_>>();
        assert_eq!(weights(&ours), weights(&theirs), "{name}");
        assert_eq!(opt.diagnostics().unwrap().steps, 4);
        assert_eq!(opt.params().len(), 4);
        assert_eq!(
            opt.step(&mut || Err(Error::Loss("no more data".to_owned())))
                .unwrap_err()
                .to_string()
                .matches("no more data")
                .count(),
            1
        );
        match opt.posterior() {
            Ok(q) => {
                assert_eq!(q.names().count(), 4, "{name}");
                q.save(dir.path().join("posterior")).unwrap();
            }
            Err(e) => {
                assert!(["sgd", "sam", "ste"].contains(name) && e.to_string().contains("no posterior"), "{name}: {e}");
            }
        }
    }
}

/// It is the same optimizer as the one whose row is known when the program is compiled.
#[test]
fn options_are_those_of_the_builder() {
    let (ours, theirs) = (net("ivon"), net("ivon"));
    let schedule = Schedule::Linear { warmup: 2, stable: 0, total: 9, end: 0.0 };
    let options = BuildOptions {
        prior: Some(Prior::isotropic(20.0)),
        noise: Some(Philox { seed: 8 }.into()),
        schedule,
        clip_grad_norm: Some(0.5),
        skip_non_finite: true,
        ..BuildOptions::default()
    };
    let mut any = row("ivon").build_with(options, &ours.vs, 0.1).unwrap();
    let builder = Ivon::default().ess(1e3).prior(Prior::isotropic(20.0)).noise(Philox { seed: 8 });
    let mut known = builder.schedule(schedule).clip_grad_norm(0.5).build(&theirs.vs, 0.1).unwrap();
    for _ in 0..4 {
        any.step(&mut || Ok(ours.losses())).unwrap();
        known.step(|| theirs.losses()).unwrap();
    }
    assert!(any.step(&mut || Ok(ours.losses() * f64::NAN)).unwrap().is_nan());
    assert_eq!(any.lr(), known.lr());
    for (a, b) in ours.weights.iter().zip(&theirs.weights) {
        assert_eq!(bits(a), bits(b));
    }
    let q = any.posterior().unwrap();
    let outputs = q.predict(&ours.vs, 5, || ours.losses().unsqueeze(1).softmax(-1, Kind::Double)).unwrap();
    assert_eq!(outputs.mean.size(), [12, 1]);
    let one = Tensor::from_slice(&[1.0]);
    let fixed = DiagonalGaussian::new([("w", one.copy(), one)]).unwrap();
    assert!(Prior::try_from(&fixed as &dyn tch_blr::Posterior).is_ok());
}
