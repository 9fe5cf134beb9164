//! Small models whose losses, weights and data are the same in every run.

use crate::places::{Place, store, variable, wave_at};
use tch::nn::VarStore;
use tch::{Kind, Tensor};

/// The kind in which losses are computed: not in half precision.
fn wide(t: &Tensor) -> Tensor {
    t.to_kind(if t.kind() == Kind::Double { Kind::Double } else { Kind::Float })
}

/// A regression with a tanh network of two layers; the second is in group 1.
#[derive(Debug)]
pub struct Net {
    pub vs: VarStore,
    pub weights: Vec<Tensor>,
    x: Tensor,
    y: Tensor,
}

pub const EXAMPLES: i64 = 12;

impl Net {
    pub fn new(place: Place) -> Self {
        Self::starting_at(place, 0.0)
    }

    /// `phase` chooses the initial weights, not the data.
    pub fn starting_at(place: Place, phase: f64) -> Self {
        let vs = store(place);
        let add = |name, group, shape: &[i64], p| variable(&vs, name, group, &(wave_at(shape, p + phase, place) * 0.7));
        let weights = vec![
            add("first.weight", 0, &[3, 5], 0.1),
            add("first.bias", 0, &[5], 0.2),
            add("second.weight", 1, &[5, 2], 0.3),
            add("second.bias", 1, &[2], 0.4),
        ];
        let x = wave_at(&[EXAMPLES, 3], 0.5, place);
        let y = wide(&(wave_at(&[EXAMPLES, 2], 0.5, place) * 0.8 + x.narrow(1, 0, 2) * 0.5));
        Net { vs, weights, x, y }
    }

    /// Losses of all examples.
    pub fn losses(&self) -> Tensor {
        self.losses_of(0, EXAMPLES)
    }

    /// Losses of `n` examples, `[n]`.
    pub fn losses_of(&self, first: i64, n: i64) -> Tensor {
        let [w1, b1, w2, b2] = &self.weights[..] else { unreachable!() };
        let output = (self.x.narrow(0, first, n).matmul(w1) + b1).tanh().matmul(w2) + b2;
        let error = wide(&output) - self.y.narrow(0, first, n);
        error.square().sum_dim_intlist(1, false, None::<Kind>)
    }

    pub fn loss(&self) -> f64 {
        tch::no_grad(|| self.losses().mean(None::<Kind>).double_value(&[]))
    }
}

/// Losses that are a sum over variables, so that the path of each variable does not depend on the others.
#[derive(Debug)]
pub struct Separable {
    pub vs: VarStore,
    place: Place,
    variables: Vec<(String, Tensor)>,
}

impl Separable {
    /// With variables `a` (group 0) and `b` (group 1).
    pub fn new(place: Place) -> Self {
        let mut s = Separable { vs: store(place), place, variables: Vec::new() };
        _ = s.add("a", 0);
        _ = s.add("b", 1);
        s
    }

    pub fn add(&mut self, name: &str, group: usize) -> Tensor {
        let w = variable(&self.vs, name, group, &(wave_at(&[2, 3], name.len() as f64, self.place) + 0.1));
        self.variables.push((name.to_owned(), w.shallow_clone()));
        w
    }

    pub fn get(&self, name: &str) -> Tensor {
        self.variables.iter().find(|(n, _)| n == name).unwrap().1.shallow_clone()
    }

    /// Three losses ℓᵢ = Σ ½ cⱼ (wⱼ - tᵢⱼ)² over the variables named.
    pub fn losses(&self, names: &[&str]) -> Tensor {
        let (kind, device) = self.place;
        let place = (if kind == Kind::Double { kind } else { Kind::Float }, device);
        let targets = wave_at(&[3, 6], 0.7, place) * 2.0;
        let scales = wave_at(&[6], 0.9, place) * 0.5 + 1.0;
        let terms = names.iter().map(|name| {
            let d = wide(&self.get(name)).reshape([1, 6]) - &targets;
            (d.square() * &scales * 0.5).sum_dim_intlist(1, false, None::<Kind>)
        });
        terms.reduce(|a, b| a + b).unwrap()
    }
}
