//! A transformer of two layers that learns to write, as in min-gpt.

use super::optimizer::{Job, Own};
use super::program::{Plan, Program};
use super::scores::Scores;
use super::text::{LENGTH, Text};
use std::path::Path;
use tch::nn::{EmbeddingConfig, Init, LinearConfig, Module, OptimizerConfig, Path as Names};
use tch::{Kind, Tensor};
use tch_blr::nn::{Embedding, LayerNorm, Linear, embedding, layer_norm, linear};
use tch_blr_examples::Outcome;

const LAYERS: usize = 2;
const HEADS: i64 = 4;
const WIDTH: i64 = 64;
const START: Init = Init::Randn { mean: 0.0, stdev: 0.02 };

struct Gpt(Text);

pub(crate) fn load(data: Option<&Path>) -> Outcome<Box<dyn Program>> {
    Ok(Box::new(Gpt(Text::load(data)?)))
}

fn dense(p: Names, from: i64, to: i64) -> Linear {
    linear(p, from, to, LinearConfig { ws_init: START, bs_init: Some(Init::Const(0.0)), bias: true })
}

fn norm(p: Names) -> LayerNorm {
    layer_norm(p, vec![WIDTH], tch::nn::LayerNormConfig::default())
}

fn table(p: Names, entries: i64) -> Embedding {
    embedding(p, entries, WIDTH, EmbeddingConfig { ws_init: START, ..EmbeddingConfig::default() })
}

struct Block {
    norms: [LayerNorm; 2],
    queries_keys_values: Linear,
    attended: Linear,
    wide: Linear,
    narrow: Linear,
}

impl Block {
    fn new(p: &Names) -> Self {
        Block {
            norms: [norm(p / "norm1"), norm(p / "norm2")],
            queries_keys_values: dense(p / "qkv", WIDTH, 3 * WIDTH),
            attended: dense(p / "attended", WIDTH, WIDTH),
            wide: dense(p / "wide", WIDTH, 4 * WIDTH),
            narrow: dense(p / "narrow", 4 * WIDTH, WIDTH),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let (b, t, _) = x.size3().expect("[B, T, C]");
        let all = self.queries_keys_values.forward(&self.norms[0].forward(x));
        let all = all.view([b, t, 3, HEADS, WIDTH / HEADS]).permute([2, 0, 3, 1, 4]);
        let [q, k, v] = [0, 1, 2].map(|i| all.select(0, i));
        let past = Tensor::ones([t, t], (Kind::Bool, x.device())).tril(0);
        let scores = q.matmul(&k.transpose(-2, -1)) / ((WIDTH / HEADS) as f64).sqrt();
        let attention = scores.masked_fill(&past.logical_not(), f64::NEG_INFINITY).softmax(-1, Kind::Float);
        let heads = attention.matmul(&v).transpose(1, 2).reshape([b, t, WIDTH]);
        let x = x + self.attended.forward(&heads);
        &x + self.narrow.forward(&self.wide.forward(&self.norms[1].forward(&x)).gelu("none"))
    }
}

impl Program for Gpt {
    fn plan(&self) -> Plan {
        Plan {
            examples: self.0.examples(),
            steps: 800,
            own: Own { build: |vs, lr| tch::nn::AdamW::default().build(vs, lr), lr: 3e-3, scheduled: true },
            adam_lr: 1e-2,
            without_vogn: None,
        }
    }

    fn run(&self, job: &Job) -> Outcome<Scores> {
        let vs = job.store();
        let (p, symbols) = (vs.root(), self.0.symbols);
        let (characters, positions) = (table(&p / "characters", symbols), table(&p / "positions", LENGTH));
        let blocks: Vec<Block> = (0..LAYERS).map(|k| Block::new(&(&p / format!("block{k}")))).collect();
        let (last, head) = (norm(&p / "norm"), dense(&p / "head", WIDTH, symbols));
        self.0.run(job, &self.plan(), &vs, 16, |x| {
            // Looked up for each example, so that each has a gradient of its own.
            let at = Tensor::arange(LENGTH, (Kind::Int64, x.device())).expand_as(x);
            let start = characters.forward(x) + positions.forward(&at);
            head.forward(&last.forward(&blocks.iter().fold(start, |x, block| block.forward(&x))))
        })
    }
}
