//! An LSTM that learns to write, as in char-rnn.

use super::optimizer::{Job, Own};
use super::program::{Plan, Program};
use super::scores::Scores;
use super::text::Text;
use std::path::Path;
use tch::nn::{self, Module, OptimizerConfig, RNN};
use tch_blr_examples::Outcome;

const WIDTH: i64 = 96;

struct Lstm(Text);

pub(crate) fn load(data: Option<&Path>) -> Outcome<Box<dyn Program>> {
    Ok(Box::new(Lstm(Text::load(data)?)))
}

impl Program for Lstm {
    fn plan(&self) -> Plan {
        Plan {
            examples: self.0.examples(),
            steps: 600,
            own: Own { build: |vs, lr| nn::Adam::default().build(vs, lr), lr: 1e-2, scheduled: false },
            adam_lr: 3e-2,
            without_vogn: Some("LSTM"),
        }
    }

    fn run(&self, job: &Job) -> Outcome<Scores> {
        let vs = job.store();
        let (p, symbols) = (vs.root(), self.0.symbols);
        let embedding = nn::embedding(&p / "embedding", symbols, WIDTH, nn::EmbeddingConfig::default());
        let lstm = nn::lstm(&p / "lstm", WIDTH, WIDTH, nn::RNNConfig::default());
        let head = nn::linear(&p / "head", WIDTH, symbols, nn::LinearConfig::default());
        self.0.run(job, &self.plan(), &vs, 32, |x| head.forward(&lstm.seq(&embedding.forward(x)).0))
    }
}
