//! One tensor that is being merged: chunks, checked reading and writing, and what the methods do in parallel.

use super::{Input, Inputs, Output, Plan};
use crate::Error;
use crate::number::{BLOCK, CHUNK, Number};
use rayon::prelude::*;
use std::ops::Range;

pub(super) struct Job<'a, T, E> {
    pub plan: &'a Plan<'a>,
    /// Name of the tensor.
    pub name: &'a str,
    pub len: usize,
    pub inputs: &'a mut dyn Inputs<T, E>,
    pub output: &'a mut dyn Output<T, E>,
}

impl<T: Number, E: From<Error>> Job<'_, T, E> {
    pub fn chunks(&self) -> impl Iterator<Item = Range<usize>> + use<T, E> {
        let len = self.len;
        (0..len).step_by(CHUNK).map(move |at| at..len.min(at + CHUNK))
    }

    /// What errors call an input.
    fn describe(&self, input: Input) -> String {
        match input {
            Input::Base => "the base".to_owned(),
            Input::BaseCurvature => "the curvature of the base".to_owned(),
            Input::Model(k) => format!("model `{}`", self.plan.models[k].0),
            Input::Curvature(k) => format!("the curvature of model `{}`", self.plan.models[k].0),
        }
    }

    /// An error that names the tensor.
    pub fn error(&self, problem: String) -> E {
        Error::parameter(self.name, problem).into()
    }

    /// Reads elements of an input, all of which must satisfy `ok`.
    fn read_checked(
        &mut self,
        input: Input,
        at: Range<usize>,
        x: &mut Vec<T>,
        ok: impl Fn(T) -> bool + Sync,
        expected: &str,
    ) -> Result<(), E> {
        x.resize(at.len(), T::zero());
        self.inputs.read(input, at.start, x)?;
        match first(x, |x| !ok(*x)) {
            None => Ok(()),
            Some(i) => {
                let (input, value) = (self.describe(input), x[i].wide());
                Err(self.error(format!("{input} has {value} in element {}: expected {expected}", at.start + i)))
            }
        }
    }

    pub fn read(&mut self, input: Input, at: Range<usize>, x: &mut Vec<T>) -> Result<(), E> {
        self.read_checked(input, at, x, T::is_finite, "finite numbers")
    }

    pub fn read_curvature(&mut self, input: Input, at: Range<usize>, x: &mut Vec<T>) -> Result<(), E> {
        self.read_checked(input, at, x, |x| x.is_finite() && x >= T::zero(), "finite numbers ≥ 0")
    }

    /// Reads d = θ_k - θ₀.
    pub fn difference(&mut self, k: usize, at: Range<usize>, base: &[T], d: &mut Vec<T>) -> Result<(), E> {
        self.read(Input::Model(k), at, d)?;
        update(d, base, |d, base| *d = *d - *base);
        Ok(())
    }

    pub fn write(&mut self, at: usize, x: &[T]) -> Result<(), E> {
        if let Some(i) = first(x, |x| !x.is_finite()) {
            let problem = format!("its element {} becomes {} in the merge; use smaller weights", at + i, x[i].wide());
            return Err(self.error(problem));
        }
        self.output.values(at, x)
    }
}

/// y ← f(y, x), in parallel.
pub(super) fn update<Y: Send, X: Sync>(y: &mut [Y], x: &[X], f: impl Fn(&mut Y, &X) + Sync) {
    y.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).for_each(|(y, x)| y.iter_mut().zip(x).for_each(|(y, x)| f(y, x)));
}

/// The first element that is bad.
pub(super) fn first<X: Sync>(x: &[X], bad: impl Fn(&X) -> bool + Sync) -> Option<usize> {
    x.par_chunks(BLOCK).enumerate().find_map_first(|(block, x)| {
        // Almost always there is none, and a loop without an exit, which runs in vector registers, finds that out
        // faster.
        let any = x.iter().fold(false, |any, x| any | bad(x));
        let place = if any { x.iter().position(&bad) } else { None };
        place.map(|i| block * BLOCK + i)
    })
}

/// Σ f(block), added in the order of the blocks: rayon's own sum adds in an order that depends on its threads.
pub(super) fn sum<const N: usize>(blocks: impl IndexedParallelIterator<Item = [f64; N]>) -> [f64; N] {
    let blocks: Vec<[f64; N]> = blocks.collect();
    blocks.into_iter().fold([0.0; N], |a, b| std::array::from_fn(|i| a[i] + b[i]))
}
