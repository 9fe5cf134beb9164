//! Where parameters lie in memory: each weight at a place of its own, so that a step changes it once.

use super::{Leaf, Params};
use crate::{Error, Result};
use std::ops::Range;
use tch::{Device, Tensor};

/// Where the memory of a tensor begins; 0 for one that is no plain memory, which libtorch would not tell.
pub(super) fn address(t: &Tensor) -> usize {
    if t.is_sparse() || t.is_mkldnn() { 0 } else { t.data_ptr() as usize }
}

/// Whether two handles are to one tensor, or to views of the same elements. Of tensors without plain memory nobody knows.
pub(super) fn is_same(a: &Tensor, b: &Tensor) -> bool {
    let plain = |t: &Tensor| !(t.is_sparse() || t.is_mkldnn());
    plain(a) && plain(b) && a.is_set_to(b)
}

/// Errors unless the tensor is plain memory with a place for every element.
pub(super) fn check_layout(name: &str, t: &Tensor) -> Result<()> {
    if t.is_sparse() || t.is_mkldnn() {
        let problem = "it is sparse or in a layout of MKL-DNN: expected a plain tensor (to_dense)";
        return Err(Error::parameter(name, problem));
    }
    // In the order of strides, each dimension has to step over all that the smaller ones reach.
    let mut dimensions: Vec<(i64, i64)> = t.stride().into_iter().zip(t.size()).filter(|(_, n)| *n > 1).collect();
    dimensions.sort_unstable();
    let mut reach = 0;
    for (stride, n) in dimensions {
        if t.numel() > 0 && stride <= reach {
            let problem =
                "several of its elements are the same memory, as after expand: give it memory of its own (copy)";
            return Err(Error::parameter(name, problem));
        }
        reach += stride * (n - 1);
    }
    Ok(())
}

/// The addresses from the first byte of a plain tensor, which has one, to behind its last one.
fn addresses(t: &Tensor) -> Range<usize> {
    let span = if t.is_contiguous() {
        t.numel()
    } else {
        t.stride().into_iter().zip(t.size()).map(|(stride, n)| stride * (n - 1)).sum::<i64>() as usize + 1
    };
    let start = t.data_ptr() as usize;
    start..start + span * t.kind().elt_size_in_bytes()
}

/// Memory that something is written to: ranges by their start, each with the furthest end up to it. They may lie within
/// each other, as columns of a matrix do.
pub(crate) struct Written(Vec<Range<usize>>);

impl Written {
    pub(crate) fn of<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Self {
        let mut all: Vec<_> = tensors.filter(|t| t.numel() > 0).map(addresses).collect();
        all.sort_unstable_by_key(|range| range.start);
        let mut furthest = 0;
        for range in &mut all {
            furthest = furthest.max(range.end);
            range.end = furthest;
        }
        Written(all)
    }

    /// Whether a tensor reaches into it.
    pub(crate) fn meets(&self, t: &Tensor) -> bool {
        if t.is_sparse() || t.is_mkldnn() || t.numel() == 0 {
            return false;
        }
        let read = addresses(t);
        let before = self.0.partition_point(|range| range.start < read.end);
        // A gap that the furthest end spans counts as written: the tensor is then copied for nothing.
        self.0[..before].last().is_some_and(|range| range.end > read.start)
    }
}

/// Where a parameter lies.
struct Span<'a> {
    start: usize,
    end: usize,
    leaf: &'a Leaf,
}

impl<'a> Span<'a> {
    fn of(leaf: &'a Leaf) -> Self {
        let Range { start, end } = addresses(&leaf.tensor);
        Span { start, end, leaf }
    }

    /// Whether its elements fill it.
    fn is_dense(&self) -> bool {
        self.end - self.start == self.leaf.tensor.numel() * self.leaf.kind.elt_size_in_bytes()
    }

    /// The addresses of its elements.
    fn addresses(&self) -> Tensor {
        let (t, size) = (&self.leaf.tensor, self.leaf.kind.elt_size_in_bytes() as i64);
        let start = Tensor::from(self.start as i64);
        let steps = t.stride().into_iter().zip(t.size()).enumerate().map(|(d, (stride, n))| {
            let mut shape = vec![1; t.dim()];
            shape[d] = n;
            (Tensor::arange(n, (tch::Kind::Int64, Device::Cpu)) * (stride * size)).reshape(shape)
        });
        steps.fold(start, |all, step| all + step).flatten(0, -1)
    }

    /// Whether an element of one is an element of the other.
    fn meets(&self, other: &Span) -> bool {
        // Two that fill theirs do; columns of one matrix lie between each other without a common element.
        (self.is_dense() && other.is_dense())
            || Tensor::isin(&self.addresses(), &other.addresses(), false, false).any().int64_value(&[]) != 0
    }
}

impl Params {
    /// Parameters that are only looked at or written to, and not trained: each weight has a place of its own.
    ///
    /// # Errors
    /// Those of `check_separate`.
    pub(crate) fn separate(params: impl Into<Params>) -> Result<Params> {
        let mut params = params.into();
        params.check_separate()?;
        Ok(params)
    }

    /// Errors if an element of a parameter shares its memory with another one, of the same or of another parameter: a
    /// step would change it twice. Looks again only when there are new ones.
    pub(crate) fn check_separate(&mut self) -> Result<()> {
        if self.separate == self.leaves.len() {
            return Ok(());
        }
        self.leaves.iter().try_for_each(|leaf| check_layout(leaf.name(), &leaf.tensor))?;
        let mut spans: Vec<Span> = self.leaves.iter().filter(|l| l.tensor.numel() > 0).map(Span::of).collect();
        // All on one device, or refused elsewhere.
        spans.sort_by_key(|span| span.start);
        for (i, a) in spans.iter().enumerate() {
            let behind = spans[i + 1..].iter().take_while(|b| b.start < a.end);
            if let Some(b) = behind.into_iter().find(|b| a.meets(b)) {
                let (a, b) = (a.leaf.name(), b.leaf.name());
                return Err(Error::Parameters(format!(
                    "`{a}` and `{b}` share some of their memory; a parameter must be the whole tensor or have its own \
                     copy, and what is tied otherwise, as by transposing, is tied in the forward pass"
                )));
            }
        }
        self.separate = self.leaves.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    fn leaf(t: &Tensor) -> Tensor {
        t.detach().set_requires_grad(true)
    }

    #[test]
    fn elements_have_places_of_their_own() {
        let t = Tensor::zeros([3, 4], (Kind::Float, Device::Cpu));
        for fine in
            [t.shallow_clone(), t.tr(), t.narrow(1, 1, 2), t.select(1, 2), t.slice(1, 0, 4, 2), t.narrow(0, 0, 0)]
        {
            check_layout("w", &fine).unwrap();
        }
        check_layout("w", &Tensor::zeros([], (Kind::Float, Device::Cpu))).unwrap();
        let row = Tensor::zeros([1, 4], (Kind::Float, Device::Cpu));
        for twice in [row.expand([3, 4], false), t.as_strided([3, 3], [1, 1], 0), t.as_strided([2, 3], [2, 1], 0)] {
            let e = check_layout("w", &twice).unwrap_err().to_string();
            assert!(e.contains("`w`") && e.contains("same memory"), "{e}");
        }
        let sparse = Tensor::ones([2, 2], (Kind::Float, Device::Cpu)).to_sparse_sparse_dim(2);
        assert!(Params::named([("w", sparse)]).unwrap_err().to_string().contains("sparse"));
    }

    #[test]
    fn parameters_do_not_overlap() {
        let t = Tensor::zeros([6, 4], (Kind::Float, Device::Cpu));
        let separate = |a: &Tensor, b: &Tensor| {
            let mut params = Params::named([("a", leaf(a)), ("b", leaf(b))]).unwrap();
            params.check_separate()
        };
        for (a, b) in [
            (t.narrow(0, 0, 2), t.narrow(0, 2, 4)),
            (t.narrow(1, 0, 2), t.narrow(1, 2, 2)),
            (t.select(1, 0), t.select(1, 3)),
            (t.slice(0, 0, 6, 2), t.slice(0, 1, 6, 2).tr()),
        ] {
            separate(&a, &b).unwrap();
        }
        for (a, b) in [
            (t.narrow(0, 0, 3), t.narrow(0, 2, 4)),
            (t.shallow_clone(), t.tr()),
            (t.narrow(1, 0, 2), t.narrow(1, 1, 3)),
            (t.select(1, 0), t.select(0, 5)),
            (t.shallow_clone(), t.slice(0, 0, 6, 2)),
        ] {
            let e = separate(&a, &b).unwrap_err().to_string();
            assert!(e.contains("`a` and `b`"), "{e}");
        }
    }

    /// A long one that ends behind the next, which does not touch it, hides nothing.
    #[test]
    fn not_only_neighbours_are_compared() {
        let t = Tensor::zeros([6, 4], (Kind::Float, Device::Cpu));
        let all =
            [("column", t.select(1, 0)), ("between", t.narrow(0, 1, 1).narrow(1, 1, 2)), ("row", t.narrow(0, 4, 1))];
        let e = Params::named(all.map(|(name, t)| (name, leaf(&t)))).unwrap().check_separate().unwrap_err().to_string();
        assert!(e.contains("`column` and `row`"), "{e}");
    }
}
