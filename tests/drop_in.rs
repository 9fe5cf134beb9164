//! The example `drop_in`: every program runs with a row of points and with one of posteriors, and the table says what
//! came of it.

// All of the example, its `main` included, which nobody calls here.
#[allow(dead_code)]
#[path = "../examples/drop_in/main.rs"]
mod example;

use clap::Parser;
use example::optimizer::{Job, NAMES, Own};
use example::program::{Plan, Program};
use example::scores::{Better, Measure, Scores};
use example::table::{Ending, Run, markdown};
use example::{Arguments, PROGRAMS, run};
use serde_json::Value;
use std::path::Path;
use support::bits;
use tch::nn::{OptimizerConfig, linear};
use tch::{Device, Kind, Tensor};
use tch_blr_examples::Outcome;

fn quick(optimizers: &[&str], programs: &[&str], folder: &Path, data: Option<&Path>) -> Vec<Run> {
    let of = |option: &str, names: &[&str]| -> Vec<String> {
        names.iter().flat_map(|name| [format!("--{option}"), (*name).to_owned()]).collect()
    };
    let all = [
        vec!["drop_in".to_owned(), "--quick".to_owned(), "--folder".to_owned(), folder.display().to_string()],
        of("optimizer", optimizers),
        of("program", programs),
    ];
    run(&Arguments::parse_from(all.concat()), data).unwrap()
}

/// Trained for a few steps, by rows with and without a posterior: finite numbers, and averages only from the former.
fn trains(programs: &[&str], data: Option<&Path>) {
    let _alone = support::seeded(0);
    let folder = tempfile::tempdir().unwrap();
    let runs = quick(&["adam", "ivon"], programs, folder.path(), data);
    assert_eq!(runs.len(), 2 * programs.len());
    for run in runs {
        let Ending::Scored(scores) = &run.ending else { panic!("{run}") };
        assert!(!scores.measures.is_empty() && scores.seconds_per_step > 0.0, "{run}");
        let can_average = !["vae", "gan", "policy"].contains(&run.program);
        for measure in &scores.measures {
            assert!(measure.at_mean.is_finite(), "{run}");
            assert_eq!(measure.averaged.is_some(), can_average && run.optimizer == "ivon", "{run}");
        }
        let file = folder.path().join(format!("{}-{}-0.json", run.program, run.optimizer));
        let written: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        let at_mean = written["ending"]["scored"]["measures"][0]["at_mean"].as_f64();
        assert_eq!(at_mean, Some(scores.measures[0].at_mean), "{run}");
    }
}

#[test]
fn programs_that_make_their_own_data_train() {
    trains(&["seq2seq", "gan", "policy"], None);
}

#[test]
fn programs_on_digits_train() {
    trains(&["linear", "convnet", "vae"], support::data_or_drawn("mnist").as_deref());
}

#[test]
fn programs_on_text_train() {
    let Some(data) = support::data("tinyshakespeare") else { return };
    trains(&["lstm", "gpt"], Some(&data));
}

#[test]
fn the_program_on_pictures_trains() {
    let Some(data) = support::data("cifar10") else { return };
    trains(&["resnet"], Some(&data));
}

#[test]
fn the_program_on_a_table_trains() {
    let Some(data) = support::data("uci") else { return };
    trains(&["tabular"], Some(&data));
}

#[test]
fn programs_without_their_data_are_left_out() {
    let _alone = support::seeded(0);
    let folder = tempfile::tempdir().unwrap();
    let runs = quick(&["adam"], &["lstm", "gpt", "resnet", "tabular", "policy"], folder.path(), Some(folder.path()));
    assert_eq!(runs.iter().map(|run| run.program).collect::<Vec<_>>(), ["policy"]);
}

fn job(optimizer: &str) -> Job<'_> {
    Job { optimizer, seed: 3, lr_scale: 1.0, quick: true, validation: false }
}

fn plan() -> Plan {
    let own = Own { build: |vs, lr| tch::nn::Sgd::default().build(vs, lr), lr: 0.1, scheduled: true };
    Plan { examples: 10, steps: 100, own, adam_lr: 1e-3, without_vogn: Some("no layers") }
}

/// Weights, and what libtorch draws after them: VAE and GAN take their noise from there.
#[test]
fn all_optimizers_start_alike() {
    let _alone = support::seeded(0);
    let start = |optimizer: &str| {
        let vs = job(optimizer).store();
        let layer = linear(vs.root(), 3, 2, tch::nn::LinearConfig::default());
        job(optimizer).optimizer(&plan(), &vs).unwrap();
        [bits(&layer.ws), bits(&Tensor::randn([4], (Kind::Float, Device::Cpu)))]
    };
    for name in NAMES {
        assert_eq!(start(name), start("own"), "{name}");
    }
}

#[test]
fn a_seed_decides_everything() {
    let _alone = support::seeded(0);
    let policy = PROGRAMS.iter().find(|(name, _)| *name == "policy").unwrap().1(None).unwrap();
    for name in NAMES {
        let value = || policy.run(&job(name)).unwrap().measures[0].at_mean;
        assert_eq!(value(), value(), "{name}");
    }
}

/// Ends as it is told to: with a number, or not.
struct Told(Option<f64>);

impl Program for Told {
    fn plan(&self) -> Plan {
        plan()
    }

    fn run(&self, job: &Job) -> Outcome<Scores> {
        let vs = job.store();
        let x = vs.root().zeros("x", &[1]);
        let mut opt = job.optimizer(&plan(), &vs)?;
        opt.step(|| (&x * if self.0.is_some() { 1.0 } else { f64::NAN }).sum(Kind::Float))?;
        let value = self.0.unwrap_or_default();
        let pair = Measure { name: "pairs", better: Better::Higher, at_mean: value, averaged: Some(2.0 * value) };
        let scores = Scores::new([pair, Measure::of_point("loss", Better::Lower, -value)], &[&opt]);
        Ok(Scores { seconds_per_step: 0.0125, ..scores })
    }
}

#[test]
fn what_goes_wrong_is_a_result() {
    let _alone = support::seeded(0);
    let told = |optimizer, value| Run::of("told", &Told(value), &job(optimizer));
    // The loss is not finite: in tch's own optimizer and in ours.
    for name in ["own", "adam"] {
        let Ending::Failed(why) = told(name, None).ending else { panic!("{name}") };
        assert!(why.contains("NaN") && why.contains("step 0"), "{why}");
    }
    // It is, but what was learned is not.
    let Ending::Failed(why) = told("own", Some(f64::INFINITY)).ending else { panic!("infinite") };
    assert_eq!(why, "pairs is inf after the last step");
    assert!(matches!(told("vogn", Some(1.0)).ending, Ending::Impossible("no layers")));
    let runs =
        [told("own", Some(1.0)), told("own", Some(3.0)), told("own", None), told("adam", None), told("vogn", None)];
    assert_eq!(
        markdown(&runs),
        "| program | measure | own | adam | vogn |\n\
         |---|---|---|---|---|\n\
         | told | pairs ↑ | 2.000 ± 1.414 / 4.000 ± 2.828 (1 of 3 failed) | failed | –, no layers |\n\
         |  | loss ↓ | -2.000 ± 1.414 (1 of 3 failed) | failed | – |\n\
         |  | ms a step | 12.5 | – | – |\n\n\
         At the mean / averaged over samples of the posterior; ± is the standard deviation over the seeds.\n"
    );
}
