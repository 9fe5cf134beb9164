//! Choosing examples: those of some classes, and mini-batches in random order.

use crate::random::Rng;
use tch::{Device, Tensor};

/// Positions of the examples whose label is one of `classes`, in order, `[K]` i64: for `index_select(0, …)`.
pub fn subset(labels: &Tensor, classes: &[i64]) -> Tensor {
    let values = Vec::<i64>::try_from(labels.to_device(Device::Cpu)).expect("labels: [N] integers");
    let positions: Vec<i64> = (0_i64..).zip(&values).filter(|(_, y)| classes.contains(y)).map(|(i, _)| i).collect();
    Tensor::from_slice(&positions).to_device(labels.device())
}

/// What becomes of the examples that do not fill the last mini-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Last {
    /// They make a smaller mini-batch.
    Keep,
    /// They sit this epoch out.
    Drop,
}

/// One epoch of shuffled mini-batches `(x, y)`; see [`batches`].
#[derive(Debug)]
pub struct Batches {
    x: Tensor,
    y: Tensor,
    order: Tensor,
    size: i64,
    start: i64,
    end: i64,
}

/// Visits every row of `x` and `y` once, in an order that `seed` decides, `size` rows at a time.
///
/// Another epoch takes another seed: `batches(&x, &y, 128, epoch, Last::Keep)`.
///
/// # Panics
///
/// If `size` is 0 or `x` and `y` do not have as many rows.
pub fn batches(x: &Tensor, y: &Tensor, size: usize, seed: u64, last: Last) -> Batches {
    let (n, size) = (x.size()[0], size as i64);
    assert!(size > 0, "batches: size 0");
    assert_eq!(n, y.size()[0], "batches: rows of x and y");
    let mut order: Vec<i64> = (0..n).collect();
    Rng::new(seed, 40).shuffle(&mut order);
    Batches {
        x: x.shallow_clone(),
        y: y.shallow_clone(),
        order: Tensor::from_slice(&order).to_device(x.device()),
        size,
        start: 0,
        end: if last == Last::Drop { n - n % size } else { n },
    }
}

impl Iterator for Batches {
    type Item = (Tensor, Tensor);

    fn next(&mut self) -> Option<Self::Item> {
        if self.start >= self.end {
            return None;
        }
        let rows = self.order.narrow(0, self.start, self.size.min(self.end - self.start));
        self.start += self.size;
        Some((self.x.index_select(0, &rows), self.y.index_select(0, &rows)))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = ((self.end - self.start).max(0) as usize).div_ceil(self.size as usize);
        (left, Some(left))
    }
}

impl ExactSizeIterator for Batches {}
