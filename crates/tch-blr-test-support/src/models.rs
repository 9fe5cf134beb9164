//! Small models whose losses, weights and data are the same in every run.

use crate::places::{Place, store, variable, wave_at};
use tch::nn::{Module, VarStore};
use tch::{Kind, Tensor};
use tch_blr::nn;

/// The kind in which losses are computed: not in half precision.
fn wide(t: &Tensor) -> Tensor {
    t.to_kind(if t.kind() == Kind::Double { Kind::Double } else { Kind::Float })
}

/// How a model computes its outputs: what some rows ask for, and others do not see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// By tensor operations on the variables.
    Plain,
    /// Linear in all weights, by layers that record.
    Tapped,
}

/// A regression with two layers; the second is in group 1. In the plain form it is a tanh network; in the tapped form
/// the layers see different inputs and their outputs are added, so that the loss is quadratic in all weights.
#[derive(Debug)]
pub struct Net {
    pub vs: VarStore,
    pub weights: Vec<Tensor>,
    form: Form,
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
        Self::of(Form::Plain, place, phase)
    }

    pub fn of(form: Form, place: Place, phase: f64) -> Self {
        let vs = store(place);
        let add = |name, group, shape: &[i64], p| variable(&vs, name, group, &(wave_at(shape, p + phase, place) * 0.7));
        let [first, bias, second]: [&[i64]; 3] = match form {
            Form::Plain => [&[3, 5], &[5], &[5, 2]],
            Form::Tapped => [&[2, 3], &[2], &[2, 2]],
        };
        let weights = vec![
            add("first.weight", 0, first, 0.1),
            add("first.bias", 0, bias, 0.2),
            add("second.weight", 1, second, 0.3),
            add("second.bias", 1, &[2], 0.4),
        ];
        let columns = if form == Form::Plain { 3 } else { 5 };
        let x = wave_at(&[EXAMPLES, columns], 0.5, place);
        let y = wide(&(wave_at(&[EXAMPLES, 2], 0.5, place) * 0.8 + x.narrow(1, 0, 2) * 0.5));
        Net { vs, weights, form, x, y }
    }

    /// Losses of all examples.
    pub fn losses(&self) -> Tensor {
        self.losses_of(0, EXAMPLES)
    }

    /// Losses of `n` examples, `[n]`.
    pub fn losses_of(&self, first: i64, n: i64) -> Tensor {
        self.losses_at(&self.weights.iter().collect::<Vec<_>>(), first, n)
    }

    /// Losses of all examples at other weights.
    pub fn losses_with(&self, weights: &[&Tensor]) -> Tensor {
        self.losses_at(weights, 0, EXAMPLES)
    }

    fn losses_at(&self, weights: &[&Tensor], first: i64, n: i64) -> Tensor {
        let [w1, b1, w2, b2] = *weights else { unreachable!("there are four weights") };
        let (x, y) = (self.x.narrow(0, first, n), self.y.narrow(0, first, n));
        if self.form == Form::Plain {
            let output = (x.matmul(w1) + b1).tanh().matmul(w2) + b2;
            return (wide(&output) - y).square().sum_dim_intlist(1, false, None::<Kind>);
        }
        let layer = |w: &Tensor, b: &Tensor| nn::Linear { ws: w.shallow_clone(), bs: Some(b.shallow_clone()) };
        let output = layer(w1, b1).forward(&x.narrow(1, 0, 3)) + layer(w2, b2).forward(&x.narrow(1, 3, 2));
        nn::squared_error(&wide(&output), &y, 1.0).unwrap()
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
    form: Form,
    variables: Vec<(String, Tensor)>,
}

impl Separable {
    /// With variables `a` (group 0) and `b` (group 1).
    pub fn new(place: Place) -> Self {
        Self::of(Form::Plain, place)
    }

    pub fn of(form: Form, place: Place) -> Self {
        let mut s = Separable { vs: store(place), place, form, variables: Vec::new() };
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

    /// Three losses over the variables named: ℓᵢ = Σ ½ cⱼ (wⱼ - tᵢⱼ)², or in the tapped form ½‖Wxᵢ - tᵢ‖².
    pub fn losses(&self, names: &[&str]) -> Tensor {
        let (kind, device) = self.place;
        let place = (if kind == Kind::Double { kind } else { Kind::Float }, device);
        if self.form == Form::Tapped {
            let (x, y) = (wave_at(&[3, 3], 0.4, self.place), wave_at(&[3, 2], 0.7, place) * 2.0);
            let each = names.iter().map(|name| {
                let layer = nn::Linear { ws: self.get(name), bs: None };
                nn::squared_error(&wide(&layer.forward(&x)), &y, 1.0).unwrap()
            });
            return each.reduce(|a, b| a + b).unwrap();
        }
        let targets = wave_at(&[3, 6], 0.7, place) * 2.0;
        let scales = wave_at(&[6], 0.9, place) * 0.5 + 1.0;
        let terms = names.iter().map(|name| {
            let d = wide(&self.get(name)).reshape([1, 6]) - &targets;
            (d.square() * &scales * 0.5).sum_dim_intlist(1, false, None::<Kind>)
        });
        terms.reduce(|a, b| a + b).unwrap()
    }
}
