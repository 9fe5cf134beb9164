//! A translation by two GRUs: numbers in English words into digits.

use super::optimizer::{Job, Own};
use super::program::{Examples, HeldOut, Plan, Program, mini_batches};
use super::scores::{Better, Predictions, Scores};
use tch::nn::{self, Module, OptimizerConfig, RNN};
use tch::{Kind, Tensor};
use tch_blr_examples::Outcome;
use tch_blr_examples::random::Rng;

const TRAIN: usize = 1000;
const HELD_OUT: usize = 500;
const WIDTH: i64 = 64;

/// Small numbers, tens, and what joins them. Word 0 fills up at the front.
const WORDS: [&str; 31] = [
    "",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
    "twenty",
    "thirty",
    "forty",
    "fifty",
    "sixty",
    "seventy",
    "eighty",
    "ninety",
    "hundred",
    "thousand",
    "and",
];
/// "nine thousand nine hundred and ninety nine"
const LONGEST: usize = 7;
/// Four digits and the end.
const DIGITS: i64 = 5;
const END: i64 = 10;
const START: i64 = 11;
const SYMBOLS: i64 = 12;

struct Seq2seq {
    train: Examples,
    held_out: HeldOut<Examples>,
}

pub(crate) fn program() -> Box<dyn Program> {
    let mut numbers: Vec<usize> = (1..10_000).collect();
    Rng::new(0, 1).shuffle(&mut numbers);
    let pairs = |numbers: &[usize]| {
        let words: Vec<Tensor> = numbers.iter().map(|&n| Tensor::from_slice(&in_words(n))).collect();
        let digits: Vec<Tensor> = numbers.iter().map(|&n| Tensor::from_slice(&in_digits(n))).collect();
        (Tensor::stack(&words, 0), Tensor::stack(&digits, 0))
    };
    let (train, rest) = numbers.split_at(TRAIN);
    let held_out = HeldOut { validation: pairs(&rest[..HELD_OUT]), test: pairs(&rest[HELD_OUT..2 * HELD_OUT]) };
    Box::new(Seq2seq { train: pairs(train), held_out })
}

fn word(word: &str) -> i64 {
    WORDS.iter().position(|w| *w == word).expect("a word of the list") as i64
}

/// Words of 1 ≤ n < 10,000, at the end of the line: the encoder then ends with the last of them.
fn in_words(n: usize) -> [i64; LONGEST] {
    let mut words = Vec::new();
    let (thousands, hundreds, rest) = (n / 1000, n / 100 % 10, n % 100);
    if thousands > 0 {
        words.extend([thousands as i64, word("thousand")]);
    }
    if hundreds > 0 {
        words.extend([hundreds as i64, word("hundred")]);
    }
    if rest > 0 && n > rest {
        words.push(word("and"));
    }
    if rest >= 20 {
        words.push(word("twenty") + (rest / 10 - 2) as i64);
    }
    let units = if rest < 20 { rest } else { rest % 10 };
    if units > 0 {
        words.push(units as i64);
    }
    let mut line = [0; LONGEST];
    line[LONGEST - words.len()..].copy_from_slice(&words);
    line
}

fn in_digits(n: usize) -> [i64; DIGITS as usize] {
    let mut line = [END; DIGITS as usize];
    for (place, digit) in line.iter_mut().zip(n.to_string().bytes()) {
        *place = i64::from(digit - b'0');
    }
    line
}

struct Network {
    words: nn::Embedding,
    digits: nn::Embedding,
    encoder: nn::GRU,
    decoder: nn::GRU,
    head: nn::Linear,
}

impl Network {
    fn new(p: &nn::Path) -> Self {
        let table = |name, entries| nn::embedding(p / name, entries, WIDTH, nn::EmbeddingConfig::default());
        let gru = |name| nn::gru(p / name, WIDTH, WIDTH, nn::RNNConfig::default());
        Network {
            words: table("words", WORDS.len() as i64),
            digits: table("digits", SYMBOLS),
            encoder: gru("encoder"),
            decoder: gru("decoder"),
            head: nn::linear(p / "head", WIDTH, SYMBOLS, nn::LinearConfig::default()),
        }
    }

    /// Logits of each digit after those before it, `[B·5, 12]`.
    fn logits(&self, words: &Tensor, digits: &Tensor) -> Tensor {
        let (_, meaning) = self.encoder.seq(&self.words.forward(words));
        let before = Tensor::cat(&[digits.narrow(1, 0, 1).full_like(START), digits.narrow(1, 0, DIGITS - 1)], 1);
        let (states, _) = self.decoder.seq_init(&self.digits.forward(&before), &meaning);
        self.head.forward(&states).flatten(0, 1)
    }
}

impl Program for Seq2seq {
    fn plan(&self) -> Plan {
        Plan {
            examples: TRAIN * DIGITS as usize,
            steps: 1000,
            own: Own { build: |vs, lr| nn::Adam::default().build(vs, lr), lr: 3e-3, scheduled: false },
            adam_lr: 1e-2,
            without_vogn: Some("GRU"),
        }
    }

    fn run(&self, job: &Job) -> Outcome<Scores> {
        let vs = job.store();
        let net = Network::new(&vs.root());
        let plan = self.plan();
        let mut opt = job.optimizer(&plan, &vs)?;
        for (words, digits) in mini_batches((&self.train.0, &self.train.1), 50, job, &plan) {
            opt.step(|| net.logits(&words, &digits).cross_entropy_for_logits(&digits.flatten(0, 1)))?;
        }
        let (words, digits) = self.held_out.of(job);
        let p = Predictions::of(job, &opt, &vs, || net.logits(words, digits))?;
        // While all digits so far are right, greedy decoding has seen the right ones before, as here.
        let exact = p.measure("exact, %", Better::Higher, |p| {
            let right = p.argmax(-1, false).view_as(digits).eq_tensor(digits).all_dim(1, false);
            Ok(100.0 * right.to_kind(Kind::Double).mean(None).double_value(&[]))
        })?;
        let y = digits.flatten(0, 1);
        Ok(Scores::new([exact, p.nll(&y)?, p.ece(&y)?], &[&opt]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_words_and_digits() {
        let words = |n| in_words(n).map(|w| WORDS[w as usize]).join(" ").trim().to_owned();
        for (n, expected) in [
            (7, "seven"),
            (40, "forty"),
            (19, "nineteen"),
            (300, "three hundred"),
            (1010, "one thousand and ten"),
            (2600, "two thousand six hundred"),
            (9999, "nine thousand nine hundred and ninety nine"),
        ] {
            assert_eq!(words(n), expected);
        }
        assert_eq!(in_digits(9999), [9, 9, 9, 9, END]);
        assert_eq!(in_digits(40), [4, 0, END, END, END]);
    }
}
