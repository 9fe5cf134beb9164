//! Selections by score, and from a stream. They know labels and numbers only; scores are in `score.rs`.

use super::error;
use super::score::numbers;
use crate::kernel::{Stream, uniform};
use crate::{Result, check};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use tch::{Device, Kind, Tensor};

/// The k examples of highest score `[n]`, highest first, or all if there are no more.
///
/// # Errors
/// k = 0, scores of another shape, a score that is NaN.
pub fn top(scores: &Tensor, k: usize) -> Result<Vec<i64>> {
    let mut kept = TopK::new(k)?;
    for (i, score) in (0..).zip(numbers(scores)?) {
        kept.offer(0, score, i)?;
    }
    Ok(kept.into_items())
}

/// The highest scores of each class `[n]` (i64), k in total and the same number per class. If k is not divisible, lower
/// labels get one more; if a class has too few examples, the others fill its places. Class by class, highest first.
///
/// # Errors
/// As [`top`]; classes of another shape or kind.
pub fn class_balanced(scores: &Tensor, classes: &Tensor, k: usize) -> Result<Vec<i64>> {
    if classes.kind() != Kind::Int64 || classes.size() != scores.size() {
        let given = format!("{:?} {:?}", classes.kind(), classes.size());
        return Err(error(format!("the classes are {given}: expected Int64 {:?} as the scores", scores.size())));
    }
    let classes: Vec<i64> = Vec::try_from(classes.to_device(Device::Cpu).contiguous().reshape([-1]))?;
    let mut kept = TopK::new(k)?;
    for ((i, score), class) in (0..).zip(numbers(scores)?).zip(classes) {
        kept.offer(class, score, i)?;
    }
    Ok(kept.into_items())
}

/// The k highest scores of a stream, the same number of every class: at any time what [`class_balanced`] would keep of
/// all that was offered, in k places. With one class it is [`top`].
///
/// ```
/// # fn main() -> tch_blr::Result<()> {
/// let mut kept = tch_blr::selection::TopK::new(4)?;
/// let stream = [(0, 0.9), (0, 0.8), (0, 0.7), (1, 0.1), (0, 0.6), (1, 0.3), (1, 0.2)];
/// for (i, (class, score)) in stream.into_iter().enumerate() {
///     kept.offer(class, score, i)?;
/// }
/// assert_eq!(kept.into_items(), [0, 1, 5, 6]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct TopK<T> {
    k: usize,
    offered: u64,
    /// Of each class, the lowest score on top.
    classes: BTreeMap<i64, BinaryHeap<Kept<T>>>,
    len: usize,
}

/// Ordered so that the greatest is the first to go: low scores, and the later among equals.
#[derive(Debug)]
struct Kept<T> {
    score: f64,
    arrival: u64,
    item: T,
}

impl<T> Ord for Kept<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        other.score.total_cmp(&self.score).then(self.arrival.cmp(&other.arrival))
    }
}

impl<T> PartialOrd for Kept<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> PartialEq for Kept<T> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<T> Eq for Kept<T> {}

impl<T> TopK<T> {
    /// With k ≥ 1 places.
    ///
    /// # Errors
    /// k = 0.
    pub fn new(k: usize) -> Result<Self> {
        check::count("k", k)?;
        Ok(TopK { k, offered: 0, classes: BTreeMap::new(), len: 0 })
    }

    /// Takes it, and returns what has to go for it: nothing while there is room, otherwise another item or itself.
    ///
    /// # Errors
    /// A score that is NaN; nothing has changed then.
    pub fn offer(&mut self, class: i64, score: f64, item: T) -> Result<Option<T>> {
        if score.is_nan() {
            return Err(error(format!("the score of offer {} is NaN", self.offered)));
        }
        // -0 becomes 0: `total_cmp` tells them apart, and equal scores are ordered by arrival.
        let kept = Kept { score: score + 0.0, arrival: self.offered, item };
        self.offered += 1;
        self.classes.entry(class).or_default().push(kept);
        if self.len < self.k {
            self.len += 1;
            return Ok(None);
        }
        // The largest class gives one up; among several, the one with the largest label.
        let largest = self.classes.iter().max_by_key(|(label, heap)| (heap.len(), **label)).map(|(label, _)| *label);
        Ok(largest.and_then(|label| self.classes.get_mut(&label)).and_then(BinaryHeap::pop).map(|kept| kept.item))
    }

    /// Number of examples kept.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing was offered yet.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What is kept, class by class, highest score first.
    pub fn into_items(self) -> Vec<T> {
        self.classes.into_values().flat_map(|heap| heap.into_sorted_vec().into_iter().map(|kept| kept.item)).collect()
    }
}

/// k of a stream, each of the n offered so far with probability k/n (Vitter 1985, algorithm R).
///
/// Which ones is a function of the seed and the number of offers alone, however the stream is cut into batches.
#[derive(Debug)]
pub struct Reservoir<T> {
    k: usize,
    seed: u64,
    offered: u64,
    items: Vec<T>,
}

impl<T> Reservoir<T> {
    /// With k ≥ 1 places.
    ///
    /// # Errors
    /// k = 0.
    pub fn new(k: usize, seed: u64) -> Result<Self> {
        check::count("k", k)?;
        Ok(Reservoir { k, seed, offered: 0, items: Vec::new() })
    }

    /// Takes it or leaves it; returns what has to go: nothing as long as there is room, the one whose place it takes,
    /// or itself.
    pub fn offer(&mut self, item: T) -> Option<T> {
        self.offered += 1;
        if self.items.len() < self.k {
            self.items.push(item);
            return None;
        }
        // A number below `offered`, by the counter of the offer, so that batches of any size give the same choice.
        let place = (uniform(self.seed, Stream::Reservoir, self.offered) * self.offered as f64) as usize;
        match self.items.get_mut(place) {
            Some(kept) => Some(std::mem::replace(kept, item)),
            None => Some(item),
        }
    }

    /// How many were offered.
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// What is kept.
    pub fn items(&self) -> &[T] {
        &self.items
    }
}

/// The last k of every class of a stream: a ring buffer for each (Chaudhry et al. 2019, *On Tiny Episodic Memories in
/// Continual Learning*; with tasks for classes that of Lopez-Paz and Ranzato 2017, *Gradient Episodic Memory*).
///
/// ```
/// # fn main() -> tch_blr::Result<()> {
/// let mut kept = tch_blr::selection::Ring::new(2)?;
/// let classes = [7, 3, 7, 7, 3].into_iter().enumerate();
/// let gone: Vec<Option<usize>> = classes.map(|(i, class)| kept.offer(class, i)).collect();
/// assert_eq!(gone, [None, None, None, Some(0), None]);
/// assert_eq!(kept.into_items(), [1, 4, 2, 3]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Ring<T> {
    k: usize,
    classes: BTreeMap<i64, VecDeque<T>>,
}

impl<T> Ring<T> {
    /// With k ≥ 1 places for each class.
    ///
    /// # Errors
    /// k = 0.
    pub fn new(k: usize) -> Result<Self> {
        check::count("k", k)?;
        Ok(Ring { k, classes: BTreeMap::new() })
    }

    /// Takes it, and returns the oldest of its class where that has to go.
    pub fn offer(&mut self, class: i64, item: T) -> Option<T> {
        let ring = self.classes.entry(class).or_default();
        let oldest = if ring.len() == self.k { ring.pop_front() } else { None };
        ring.push_back(item);
        oldest
    }

    /// Number of examples kept.
    pub fn len(&self) -> usize {
        self.classes.values().map(VecDeque::len).sum()
    }

    /// Whether nothing was offered yet.
    pub fn is_empty(&self) -> bool {
        self.classes.is_empty()
    }

    /// What is kept, class by class, oldest first.
    pub fn items(&self) -> impl Iterator<Item = &T> {
        self.classes.values().flatten()
    }

    /// As [`Ring::items`].
    pub fn into_items(self) -> Vec<T> {
        self.classes.into_values().flatten().collect()
    }
}
