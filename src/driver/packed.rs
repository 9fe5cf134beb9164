//! Sums over the ranks: from the tensors of one rank to the memory where they are added up, and back.

use super::Optimizer;
use super::arithmetic::{Arithmetic, Unit};
use super::ranks::{Buffer, Ranks};
use super::row::Row;
use super::step::Ended;
use super::sums::Sums;
use super::together::Brought;
use crate::Result;
use std::ops::Range;
use tch::{Kind, Tensor};

/// Sums of one rank, laid out for the sum over all; a kind of numbers after the other.
pub(super) struct Packed {
    pub sums: Sums,
    kinds: Vec<Flat>,
}

impl Packed {
    /// Writes to the memory what it does not hold already.
    pub fn new(mut sums: Sums, flats: Vec<Flat>) -> Result<Self> {
        let (_no_grad, factor) = (tch::no_grad_guard(), sums.factor());
        for Flat { buffer: Buffer { whole, .. }, places } in &flats {
            let mut there = Vec::with_capacity(places.len());
            for place in places {
                let mut memory = place.of(whole)?;
                let own = place.what.of(&sums).filter(|_| factor > 0.0);
                match own {
                    // It was formed there.
                    Some(t) if t.data_ptr() == memory.data_ptr() => {}
                    Some(t) => memory.f_copy_(t)?,
                    None => _ = memory.f_zero_()?,
                }
                there.push(f64::from(u8::from(own.is_some())));
            }
            let count = places.len() as i64;
            let n = whole.size()[0] - count;
            whole.f_narrow(0, n, count)?.f_copy_(&Tensor::from_slice(&there))?;
            if factor > 0.0 && factor != 1.0 {
                _ = whole.f_narrow(0, 0, n)?.f_mul_scalar_(factor)?;
            }
        }
        (sums.gradients, sums.sizes, sums.statistics) = Default::default();
        Ok(Packed { sums, kinds: flats })
    }
}

/// Tensors one after the other, and behind them for each whether there is one.
pub(super) struct Flat {
    buffer: Buffer,
    places: Vec<Place>,
}

/// Where a tensor lies.
struct Place {
    what: What,
    size: Vec<i64>,
    range: Range<i64>,
}

impl Place {
    fn of(&self, whole: &Tensor) -> Result<Tensor> {
        Ok(whole.f_narrow(0, self.range.start, self.range.end - self.range.start)?.f_view(&self.size[..])?)
    }
}

/// Whose sum it is, by the number of the parameter or unit.
#[derive(Clone, Copy)]
enum What {
    Gradient(usize),
    Size(usize),
    Statistic(usize, usize),
}

impl What {
    fn of(self, sums: &Sums) -> Option<&Tensor> {
        match self {
            What::Gradient(i) => sums.gradients.get(i)?.as_ref(),
            What::Size(i) => sums.sizes.get(i)?.as_ref(),
            What::Statistic(u, i) => sums.statistics.get(u)?.get(i),
        }
    }

    fn put(self, sums: &mut Sums, t: Tensor) {
        match self {
            What::Gradient(i) => sums.gradients[i] = Some(t),
            What::Size(i) => sums.sizes[i] = Some(t),
            // In the order of i.
            What::Statistic(u, _) => sums.statistics[u].push(t),
        }
    }
}

impl<R: Row> Optimizer<R> {
    /// Memory for the sums over the ranks: each kind of number in one piece.
    pub(super) fn laid_out(&self, ranks: &Ranks) -> Result<Vec<Flat>> {
        let known = self.known(ranks)?;
        let mut flats = Vec::new();
        for kind in [Kind::Float, Kind::Double] {
            let mut places = Vec::new();
            let mut end = 0;
            let mut put = |what: What, size: Vec<i64>| {
                let start = end;
                end += size.iter().product::<i64>();
                places.push(Place { what, size, range: start..end });
            };
            let leaves = self.params.leaves().iter().enumerate();
            for (i, leaf) in leaves.filter(|(_, leaf)| leaf.trainable() && R::Arithmetic::kind(leaf) == kind) {
                put(What::Gradient(i), leaf.tensor.size());
                if self.skip_unseen {
                    put(What::Size(i), leaf.tensor.size());
                }
            }
            for (u, (unit, sizes)) in self.units.iter().zip(&known.statistics).enumerate() {
                if self.kind_of(unit) == Some(kind) {
                    sizes.iter().enumerate().for_each(|(i, size)| put(What::Statistic(u, i), size.clone()));
                }
            }
            if !places.is_empty() {
                // All parameters are on one device.
                let device = self.params.leaves()[0].tensor.device();
                flats.push(Flat { buffer: ranks.buffer(end + places.len() as i64, kind, device)?, places });
            }
        }
        Ok(flats)
    }

    /// An evaluation whose statistic is yet to be formed gets the memory where it is summed, which saves a copy.
    pub(super) fn form_in_place(&self, flats: &[Flat], ended: &mut Ended) -> Result<()> {
        let sums = &mut ended.sums;
        if !R::Arithmetic::SINGLE || sums.evaluations != 1 || sums.is_empty() || !sums.statistics.is_empty() {
            return Ok(());
        }
        sums.statistics.resize_with(self.units.len(), Vec::new);
        for (flat, place) in flats.iter().flat_map(|flat| flat.places.iter().map(move |place| (flat, place))) {
            if let What::Statistic(u, _) = place.what {
                sums.statistics[u].push(place.of(&flat.buffer.whole)?);
            }
        }
        Ok(())
    }

    /// Of a unit that is trained: the kind of its statistics.
    fn kind_of(&self, unit: &Unit<R>) -> Option<Kind> {
        unit.leaves(&self.params).find(|leaf| leaf.trainable()).map(R::Arithmetic::kind)
    }

    /// The means over all ranks, in memory that the next call uses again.
    pub(super) fn summed(&self, packed: Packed, all: Brought) -> Result<Sums> {
        let Some(ranks) = &self.ranks else { return Ok(packed.sums) };
        let _no_grad = tch::no_grad_guard();
        let (parameters, per_example) = (self.params.len(), all.per_example > 0.0);
        let mut sums = Sums {
            weight: all.weight,
            merged: false,
            loss: all.loss / all.weight,
            largest_norm: all.largest_norm,
            per_example,
            ..packed.sums
        };
        sums.gradients.resize_with(parameters, || None);
        sums.sizes.resize_with(if self.skip_unseen { parameters } else { 0 }, || None);
        sums.statistics.resize_with(self.units.len(), Vec::new);
        for Flat { mut buffer, places } in packed.kinds {
            ranks.sum(&mut buffer)?;
            let (whole, count) = (buffer.whole, places.len() as i64);
            let n = whole.size()[0] - count;
            let there = whole.f_narrow(0, n, count)?.f_to_kind(Kind::Double)?;
            let there = Vec::<f64>::try_from(&there)?;
            _ = whole.f_narrow(0, 0, n)?.f_div_scalar_(all.weight)?;
            for (place, _) in places.iter().zip(there).filter(|(_, there)| *there > 0.0) {
                let own = place.of(&whole)?;
                // A row over blocks may keep what it is given, and this memory is used again.
                place.what.put(&mut sums, if R::Arithmetic::SINGLE { own } else { own.copy() });
            }
        }
        Ok(sums)
    }
}
