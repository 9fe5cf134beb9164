//! The elementwise computation as tensor expressions: any device, any layout. On the CPU its arithmetic gives the
//! bits of the lanes; tanh and the normals agree to rounding.

use super::{Elementwise, Field, Job, Real, normal};
use std::cell::{Ref, RefCell};
use std::ops::{Add, Div, Mul, Neg, Sub};
use tch::Tensor;

/// Owns the tensors of a computation: a [`Real`] is `Copy`, and a tensor is not.
#[derive(Default)]
struct Arena(RefCell<Vec<Tensor>>);

impl Arena {
    fn push(&self, t: Tensor) -> Expr<'_> {
        let mut nodes = self.0.borrow_mut();
        nodes.push(t);
        Expr::Node(self, nodes.len() - 1)
    }

    fn at(&self, i: usize) -> Ref<'_, Tensor> {
        Ref::map(self.0.borrow(), |nodes| &nodes[i])
    }
}

/// A number, or a tensor in an arena, which makes it `Copy`.
#[derive(Clone, Copy)]
enum Expr<'a> {
    Number(f64),
    Node(&'a Arena, usize),
}

impl Expr<'_> {
    fn unary(self, number: impl Fn(f64) -> f64, tensor: impl Fn(&Tensor) -> Tensor) -> Self {
        match self {
            Expr::Number(x) => Expr::Number(number(x)),
            Expr::Node(arena, i) => {
                let y = tensor(&arena.at(i));
                arena.push(y)
            }
        }
    }

    fn binary(
        self,
        other: Self,
        numbers: impl Fn(f64, f64) -> f64,
        tensors: impl Fn(&Tensor, &Tensor) -> Tensor,
    ) -> Self {
        // A 0-dim tensor of the other operand's kind broadcasts and promotes nothing, and from the CPU it may meet any
        // device.
        let scalar = |x: f64, like: &Tensor| Tensor::from(x).to_kind(like.kind());
        let (arena, y) = match (self, other) {
            (Expr::Number(a), Expr::Number(b)) => return Expr::Number(numbers(a, b)),
            (Expr::Node(arena, a), Expr::Node(_, b)) => (arena, tensors(&arena.at(a), &arena.at(b))),
            (Expr::Node(arena, a), Expr::Number(b)) => (arena, tensors(&arena.at(a), &scalar(b, &arena.at(a)))),
            (Expr::Number(a), Expr::Node(arena, b)) => (arena, tensors(&scalar(a, &arena.at(b)), &arena.at(b))),
        };
        arena.push(y)
    }
}

// tch's operators panic where libtorch fails. The tensors of a job agree in shape, kind and device, so that only
// memory can run out.
impl Add for Expr<'_> {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        self.binary(other, |a, b| a + b, |a, b| a + b)
    }
}
impl Sub for Expr<'_> {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        self.binary(other, |a, b| a - b, |a, b| a - b)
    }
}
impl Mul for Expr<'_> {
    type Output = Self;
    fn mul(self, other: Self) -> Self {
        self.binary(other, |a, b| a * b, |a, b| a * b)
    }
}
impl Div for Expr<'_> {
    type Output = Self;
    fn div(self, other: Self) -> Self {
        self.binary(other, |a, b| a / b, |a, b| a / b)
    }
}
impl Neg for Expr<'_> {
    type Output = Self;
    fn neg(self) -> Self {
        self.unary(|x| -x, Tensor::neg)
    }
}

impl Real for Expr<'_> {
    fn real(x: f64) -> Self {
        Expr::Number(x)
    }
    fn sqrt(self) -> Self {
        self.unary(f64::sqrt, Tensor::sqrt)
    }
    fn abs(self) -> Self {
        self.unary(f64::abs, Tensor::abs)
    }
    fn tanh(self) -> Self {
        self.unary(f64::tanh, Tensor::tanh)
    }
    // libtorch's minimum and maximum pass a NaN on from either side, so one in `self` stays.
    fn min(self, other: Self) -> Self {
        self.binary(other, Real::min, Tensor::minimum)
    }
    fn max(self, other: Self) -> Self {
        self.binary(other, Real::max, Tensor::maximum)
    }
}

pub(super) fn run<E: Elementwise>(Job { f, inputs, outputs }: Job<E>) {
    let arena = Arena::default();
    let like = outputs.iter().flatten().next().expect("a job has an output");
    let fields: Vec<Expr> = inputs
        .iter()
        .map(|x| match *x {
            Field::Number(x) => Expr::Number(x),
            Field::Tensor(t) => arena.push(t.shallow_clone()),
            Field::Noise { seed, at } => arena.push(normal::normals(seed, at, like)),
        })
        .collect();
    let given = arena.0.borrow().len();
    let written = RefCell::new(Vec::new());
    f.eval(f.constants(), |i| fields[i], |o, x| written.borrow_mut().push((o, x)));
    let nodes = arena.0.borrow();
    let wanted = written.into_inner().into_iter().filter_map(|(o, x)| Some((outputs[o]?.shallow_clone(), x)));
    let result = |(output, x): (Tensor, Expr)| match x {
        Expr::Number(x) => (super::filled(&output, x), output),
        // An input itself: its memory may be that of an output which is written before this one.
        Expr::Node(_, i) if i < given => (nodes[i].copy(), output),
        Expr::Node(_, i) => (nodes[i].shallow_clone(), output),
    };
    // All results exist before the first is written, since outputs may be inputs.
    let results: Vec<(Tensor, Tensor)> = wanted.map(result).collect();
    for (x, mut output) in results {
        output.copy_(&x);
    }
}
