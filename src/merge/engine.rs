//! The arithmetic of every [`Method`], on one tensor at a time, a chunk at a time.
//!
//! Named tensors in memory and files on the disk are both merged here: they differ in where chunks come from ([`Inputs`]) and
//! go to ([`Output`]). What needs the whole tensor first (a threshold, an angle, a norm) takes passes of its own over the chunks.
//! Chunks and the blocks in them have fixed sizes, and sums over blocks are added in order: a result depends neither on the
//! number of threads nor on where the tensors lie.

use super::method::{Keep, Method, Rescale, TaskVectors};
use crate::{Error, Result, kernel};
use num_traits::Float;
use rayon::prelude::*;

/// Elements that are in memory at a time, of each input.
pub(crate) const CHUNK: usize = 1 << 20;
/// Elements that a thread takes at a time.
const BLOCK: usize = 1 << 14;
/// A histogram's bins: one for each value of a 16-bit digit.
const BINS: usize = 1 << 16;
/// Beyond this cosine, the arc between two vectors is taken for a line.
const COLLINEAR: f64 = 0.9995;

/// What is computed in: f32, or f64 where an input is f64.
pub(crate) trait Number: Float + Default + Send + Sync + 'static {
    /// 16-bit digits of [`Number::magnitude`].
    const DIGITS: u32;
    /// A number that orders non-negative values as they are ordered.
    fn magnitude(self) -> u64;
    fn of(x: f64) -> Self;
    fn from_single(x: f32) -> Self;
    fn wide(self) -> f64;
    fn single(self) -> f32;
}

impl Number for f32 {
    const DIGITS: u32 = 2;
    fn magnitude(self) -> u64 {
        u64::from(self.abs().to_bits())
    }
    fn of(x: f64) -> Self {
        x as f32
    }
    fn from_single(x: f32) -> Self {
        x
    }
    fn wide(self) -> f64 {
        f64::from(self)
    }
    fn single(self) -> f32 {
        self
    }
}

impl Number for f64 {
    const DIGITS: u32 = 4;
    fn magnitude(self) -> u64 {
        self.abs().to_bits()
    }
    fn of(x: f64) -> Self {
        x
    }
    fn from_single(x: f32) -> Self {
        f64::from(x)
    }
    fn wide(self) -> f64 {
        self
    }
    fn single(self) -> f32 {
        self as f32
    }
}

/// One of the tensors that a merged tensor comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Input {
    Base,
    BaseCurvature,
    Model(usize),
    Curvature(usize),
}

pub(crate) trait Inputs<T> {
    /// Elements `at`.. of an input, as many as fit into `x`.
    fn read(&mut self, input: Input, at: usize, x: &mut [T]) -> Result<()>;
}

pub(crate) trait Output<T> {
    /// Elements `at`.. of the merged tensor.
    fn values(&mut self, at: usize, x: &[T]) -> Result<()>;
    /// Elements `at`.. of its precision, from the methods that have one.
    fn precision(&mut self, _at: usize, _s: &[T]) -> Result<()> {
        Ok(())
    }
}

/// A method with its models.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub method: Method,
    /// Name and weight of each.
    pub models: Vec<(&'a str, f64)>,
    /// Whether curvatures are precisions of posteriors, s_k = H₀ + H_k, rather than H_k.
    pub posteriors: bool,
}

/// One tensor under way.
struct Job<'a, T> {
    plan: &'a Plan<'a>,
    /// Name of the tensor.
    name: &'a str,
    len: usize,
    inputs: &'a mut dyn Inputs<T>,
    output: &'a mut dyn Output<T>,
}

/// Merges one tensor of `len` elements.
pub(crate) fn merge<T: Number>(
    plan: &Plan,
    name: &str,
    len: usize,
    inputs: &mut dyn Inputs<T>,
    output: &mut dyn Output<T>,
) -> Result<()> {
    let mut job = Job { plan, name, len, inputs, output };
    match plan.method {
        Method::Linear { normalize } => {
            let sum = if normalize { plan.models.iter().map(|(_, w)| w).sum() } else { 1.0 };
            job.linear(&plan.models.iter().map(|(_, w)| w / sum).collect::<Vec<_>>())
        }
        Method::Slerp { t } => {
            let weights = job.arc(t)?;
            job.linear(&weights)
        }
        Method::TaskVectors(v) => job.task_vectors(&v),
        Method::Fisher | Method::GradientMatching { .. } | Method::Combine => job.natural(),
    }
}

/// The smallest s/s' of one tensor's elements, where s is the precision of model 0 and s' that of model 1: what of s' can be taken
/// away is less than this.
pub(crate) fn smallest_ratio<T: Number>(
    plan: &Plan,
    name: &str,
    len: usize,
    inputs: &mut dyn Inputs<T>,
) -> Result<f64> {
    struct Nowhere;
    impl<T> Output<T> for Nowhere {
        fn values(&mut self, _: usize, _: &[T]) -> Result<()> {
            Ok(())
        }
    }
    let mut job = Job { plan, name, len, inputs, output: &mut Nowhere };
    let (mut s, mut part) = (Vec::new(), Vec::new());
    let mut smallest = f64::INFINITY;
    for at in job.chunks() {
        job.read_curvature(Input::Curvature(0), at.clone(), &mut s)?;
        job.read_curvature(Input::Curvature(1), at, &mut part)?;
        let ratios = s.par_iter().zip(&part).with_min_len(BLOCK).map(|(s, part)| s.wide() / part.wide());
        smallest = ratios.filter(|r| !r.is_nan()).reduce(|| f64::INFINITY, f64::min).min(smallest);
    }
    Ok(smallest)
}

/// y ← f(y, x), in parallel.
fn update<Y: Send, X: Sync>(y: &mut [Y], x: &[X], f: impl Fn(&mut Y, &X) + Sync) {
    y.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).for_each(|(y, x)| y.iter_mut().zip(x).for_each(|(y, x)| f(y, x)));
}

/// The first element that is bad.
fn first<X: Sync>(x: &[X], bad: impl Fn(&X) -> bool + Sync) -> Option<usize> {
    x.par_chunks(BLOCK).enumerate().find_map_first(|(block, x)| {
        // Almost always there is none, which a loop without an exit tells faster.
        let any = x.iter().fold(false, |any, x| any | bad(x));
        let place = if any { x.iter().position(&bad) } else { None };
        place.map(|i| block * BLOCK + i)
    })
}

/// Σ f(block) in the order of the blocks.
fn sum<const N: usize>(blocks: impl IndexedParallelIterator<Item = [f64; N]>) -> [f64; N] {
    let blocks: Vec<[f64; N]> = blocks.collect();
    blocks.into_iter().fold([0.0; N], |a, b| std::array::from_fn(|i| a[i] + b[i]))
}

/// A seed for the elements that one model keeps of one tensor.
fn stream(seed: u64, tensor: &str, model: &str) -> u64 {
    // FNV-1a over both names, with a byte between them that UTF-8 does not have.
    let bytes = tensor.bytes().chain([0xff]).chain(model.bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    let [low, high, ..] = kernel::words(seed, hash);
    u64::from(low) | u64::from(high) << 32
}

/// How the elements of one model's difference are kept, once the passes over the whole tensor are done.
enum Selection {
    All,
    /// Those above a magnitude, and the first `ties` that have it.
    Above {
        magnitude: u64,
        ties: usize,
    },
    /// Those whose 32 random bits are below `density`·2³², times `scale`.
    Random {
        stream: u64,
        below: u64,
        scale: f64,
    },
}

impl Selection {
    fn apply<T: Number>(&mut self, at: usize, d: &mut [T]) {
        match self {
            Selection::All => {}
            Selection::Above { magnitude, ties } => {
                let magnitude = *magnitude;
                let tied = |d: &&T| d.magnitude() == magnitude;
                let found: Vec<usize> = d.par_chunks(BLOCK).map(|d| d.iter().filter(tied).count()).collect();
                // How many of the ties each block may keep.
                let quotas: Vec<usize> = found
                    .iter()
                    .map(|n| {
                        let quota = (*n).min(*ties);
                        *ties -= quota;
                        quota
                    })
                    .collect();
                d.par_chunks_mut(BLOCK).zip(quotas).for_each(|(d, mut quota)| {
                    for d in d {
                        let m = d.magnitude();
                        let keep = m > magnitude || m == magnitude && quota > 0;
                        quota -= usize::from(keep && m == magnitude);
                        if !keep {
                            *d = T::zero();
                        }
                    }
                });
            }
            Selection::Random { stream, below, scale } => {
                let (stream, below, scale) = (*stream, *below, T::of(*scale));
                d.par_chunks_mut(BLOCK).enumerate().for_each(|(block, d)| {
                    let first = (at + block * BLOCK) as u64 / 4;
                    for (group, d) in d.chunks_mut(4).enumerate() {
                        let words = kernel::words(stream, first + group as u64);
                        for (d, word) in d.iter_mut().zip(words) {
                            *d = if u64::from(word) < below { *d * scale } else { T::zero() };
                        }
                    }
                });
            }
        }
    }
}

impl<T: Number> Job<'_, T> {
    fn chunks(&self) -> impl Iterator<Item = std::ops::Range<usize>> + use<T> {
        let len = self.len;
        (0..len).step_by(CHUNK).map(move |at| at..len.min(at + CHUNK))
    }

    fn of(&self, input: Input) -> String {
        match input {
            Input::Base => "the base".to_owned(),
            Input::BaseCurvature => "the curvature of the base".to_owned(),
            Input::Model(k) => format!("model `{}`", self.plan.models[k].0),
            Input::Curvature(k) => format!("the curvature of model `{}`", self.plan.models[k].0),
        }
    }

    /// Reads elements of an input that must satisfy `ok`.
    fn read_checked(
        &mut self,
        input: Input,
        at: std::ops::Range<usize>,
        x: &mut Vec<T>,
        ok: impl Fn(T) -> bool + Sync,
        expected: &str,
    ) -> Result<()> {
        x.resize(at.len(), T::zero());
        self.inputs.read(input, at.start, x)?;
        match first(x, |x| !ok(*x)) {
            None => Ok(()),
            Some(i) => {
                let problem =
                    format!("{} has {} in element {}: expected {expected}", self.of(input), x[i].wide(), at.start + i);
                Err(Error::parameter(self.name, problem))
            }
        }
    }

    fn read(&mut self, input: Input, at: std::ops::Range<usize>, x: &mut Vec<T>) -> Result<()> {
        self.read_checked(input, at, x, T::is_finite, "finite numbers")
    }

    fn read_curvature(&mut self, input: Input, at: std::ops::Range<usize>, x: &mut Vec<T>) -> Result<()> {
        self.read_checked(input, at, x, |x| x.is_finite() && x >= T::zero(), "finite numbers ≥ 0")
    }

    /// Σ w_k θ_k
    fn linear(&mut self, weights: &[f64]) -> Result<()> {
        let (mut total, mut x) = (Vec::new(), Vec::new());
        for at in self.chunks() {
            total.clear();
            total.resize(at.len(), T::zero());
            for (k, w) in weights.iter().enumerate() {
                let w = T::of(*w);
                self.read(Input::Model(k), at.clone(), &mut x)?;
                update(&mut total, &x, |total, x| *total = *total + w * *x);
            }
            self.write(at.start, &total)?;
        }
        Ok(())
    }

    /// The weights of the two models at `t` of the arc between them.
    fn arc(&mut self, t: f64) -> Result<[f64; 2]> {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        let [mut aa, mut ab, mut bb] = [0.0; 3];
        for at in self.chunks() {
            self.read(Input::Model(0), at.clone(), &mut a)?;
            self.read(Input::Model(1), at, &mut b)?;
            let products = a.par_chunks(BLOCK).zip(b.par_chunks(BLOCK)).map(|(a, b)| {
                a.iter().zip(b).fold([0.0; 3], |[aa, ab, bb], (a, b)| {
                    let (a, b) = (a.wide(), b.wide());
                    [aa + a * a, ab + a * b, bb + b * b]
                })
            });
            let [p, q, r] = sum(products);
            (aa, ab, bb) = (aa + p, ab + q, bb + r);
        }
        let line = [1.0 - t, t];
        let norms = aa.sqrt() * bb.sqrt();
        let cos = (ab / norms).clamp(-1.0, 1.0);
        if norms == 0.0 || cos.abs() > COLLINEAR {
            return Ok(line);
        }
        let angle = cos.acos();
        Ok(line.map(|part| (part * angle).sin() / angle.sin()))
    }

    /// d = θ_k - θ₀
    fn difference(&mut self, k: usize, at: std::ops::Range<usize>, base: &[T], d: &mut Vec<T>) -> Result<()> {
        self.read(Input::Model(k), at, d)?;
        update(d, base, |d, base| *d = *d - *base);
        Ok(())
    }

    /// θ₀ + λ Σ w_k d_k
    fn task_vectors(&mut self, v: &TaskVectors) -> Result<()> {
        let mut selections = self.selections(v.keep)?;
        let weights: Vec<T> = self.plan.models.iter().map(|(_, w)| T::of(*w)).collect();
        let lambda = T::of(v.lambda);
        let all = weights.iter().fold(T::zero(), |sum, w| sum + *w);
        let mut base = Vec::new();
        let mut differences = vec![Vec::new(); weights.len()];
        for at in self.chunks() {
            self.read(Input::Base, at.clone(), &mut base)?;
            for (k, (d, selection)) in differences.iter_mut().zip(&mut selections).enumerate() {
                self.difference(k, at.clone(), &base, d)?;
                selection.apply(at.start, d);
            }
            let differences = &differences;
            base.par_chunks_mut(BLOCK).enumerate().for_each(|(block, base)| {
                let terms =
                    |i: usize| weights.iter().zip(differences).map(move |(w, d)| (*w, *w * d[block * BLOCK + i]));
                for (i, theta) in base.iter_mut().enumerate() {
                    let mut total = terms(i).fold(T::zero(), |sum, (_, wd)| sum + wd);
                    let mut share = all;
                    if v.elect_signs {
                        let positive = total >= T::zero();
                        let agrees = |wd: T| if positive { wd > T::zero() } else { wd < T::zero() };
                        (share, total) = terms(i)
                            .filter(|(_, wd)| agrees(*wd))
                            .fold((T::zero(), T::zero()), |(share, total), (w, wd)| (share + w, total + wd));
                    }
                    // Nobody agrees where all differences are zero.
                    if v.normalize && share != T::zero() {
                        total = total / share;
                    }
                    *theta = *theta + lambda * total;
                }
            });
            self.write(at.start, &base)?;
        }
        Ok(())
    }

    fn selections(&mut self, keep: Keep) -> Result<Vec<Selection>> {
        let models = 0..self.plan.models.len();
        match keep {
            Keep::Largest { density } if density < 1.0 => {
                let kept = ((density * self.len as f64) as usize).clamp(1, self.len.max(1));
                self.thresholds(kept)
            }
            Keep::All | Keep::Largest { .. } => Ok(models.map(|_| Selection::All).collect()),
            Keep::Random { density, rescale, seed } => {
                let below = (density * 4_294_967_296.0).round() as u64;
                let streams = models.map(|k| stream(seed, self.name, self.plan.models[k].0));
                let random = |scale: f64| move |stream| Selection::Random { stream, below, scale };
                match rescale {
                    Rescale::Density => Ok(streams.map(random(1.0 / density)).collect()),
                    Rescale::L1Norm => self.preserving_l1(streams.map(random(1.0)).collect()),
                }
            }
        }
    }

    /// The magnitude of the `kept`-th largest difference of each model: its 16-bit digits from the highest on, each by a pass
    /// that counts the elements that have the digits before it.
    fn thresholds(&mut self, kept: usize) -> Result<Vec<Selection>> {
        let models = self.plan.models.len();
        let (mut base, mut d) = (Vec::new(), Vec::new());
        let (mut prefixes, mut ranks) = (vec![0u64; models], vec![kept; models]);
        for digit in (0..T::DIGITS).rev() {
            let mut counts = vec![vec![0usize; BINS]; models];
            for at in self.chunks() {
                self.read(Input::Base, at.clone(), &mut base)?;
                for k in 0..models {
                    self.difference(k, at.clone(), &base, &mut d)?;
                    let prefix = prefixes[k];
                    // As few histograms as threads: each is as large as a block.
                    let part = d.len().div_ceil(rayon::current_num_threads()).max(BLOCK);
                    let parts = d.par_chunks(part).map(|d| {
                        let mut counts = vec![0u32; BINS];
                        for m in d.iter().map(|d| d.magnitude() >> (16 * digit)) {
                            if m >> 16 == prefix {
                                counts[(m & 0xffff) as usize] += 1;
                            }
                        }
                        counts
                    });
                    for part in parts.collect::<Vec<_>>() {
                        counts[k].iter_mut().zip(part).for_each(|(count, n)| *count += n as usize);
                    }
                }
            }
            for ((prefix, rank), counts) in prefixes.iter_mut().zip(&mut ranks).zip(counts) {
                let mut bin = BINS - 1;
                while bin > 0 && counts[bin] < *rank {
                    *rank -= counts[bin];
                    bin -= 1;
                }
                *prefix = *prefix << 16 | bin as u64;
            }
        }
        let above = prefixes.into_iter().zip(ranks).map(|(magnitude, ties)| Selection::Above { magnitude, ties });
        Ok(above.collect())
    }

    /// Random selections, scaled so that Σ|d| stays.
    fn preserving_l1(&mut self, mut selections: Vec<Selection>) -> Result<Vec<Selection>> {
        let (mut base, mut d) = (Vec::new(), Vec::new());
        let mut norms = vec![[0.0; 2]; selections.len()];
        let l1 = |d: &[T]| sum(d.par_chunks(BLOCK).map(|d| [d.iter().map(|d| d.wide().abs()).sum::<f64>()]))[0];
        for at in self.chunks() {
            self.read(Input::Base, at.clone(), &mut base)?;
            for (k, (selection, [whole, kept])) in selections.iter_mut().zip(&mut norms).enumerate() {
                self.difference(k, at.clone(), &base, &mut d)?;
                *whole += l1(&d);
                selection.apply(at.start, &mut d);
                *kept += l1(&d);
            }
        }
        for (selection, [whole, kept]) in selections.iter_mut().zip(norms) {
            // Where nothing is kept, no scale brings the norm back.
            if let (Selection::Random { scale, .. }, true) = (selection, kept > 0.0) {
                *scale = whole / kept;
            }
        }
        Ok(selections)
    }

    /// θ = Σ w_k s_k θ_k / Σ w_k s_k, in f64; gradient matching has the base as one more term, of weight 1 - Σ w_k.
    fn natural(&mut self) -> Result<()> {
        let plan = self.plan;
        let rest = 1.0 - plan.models.iter().map(|(_, w)| w).sum::<f64>();
        let delta = if let Method::GradientMatching { delta } = self.plan.method { delta } else { 0.0 };
        let (mut x, mut s, mut base) = (Vec::new(), Vec::new(), Vec::new());
        // Σ w s θ, Σ w s and Σ w θ
        let mut sums: Vec<[f64; 3]> = Vec::new();
        let add = |sums: &mut Vec<[f64; 3]>, w: f64, x: &[T], s: &[T], offset: &(dyn Fn(usize) -> f64 + Sync)| {
            sums.par_chunks_mut(BLOCK).enumerate().for_each(|(block, sums)| {
                for (i, [sx, ss, plain]) in sums.iter_mut().enumerate() {
                    let i = block * BLOCK + i;
                    let (x, s) = (x[i].wide(), w * (s[i].wide() + offset(i)));
                    *sx += s * x;
                    *ss += s;
                    *plain += w * x;
                }
            });
        };
        for at in self.chunks() {
            sums.clear();
            sums.resize(at.len(), [0.0; 3]);
            base.clear();
            base.resize(at.len(), T::zero());
            if self.plan.method.needs_base() {
                self.read(Input::Base, at.clone(), &mut x)?;
                self.read_curvature(Input::BaseCurvature, at.clone(), &mut base)?;
                add(&mut sums, rest, &x, &base, &|_| delta);
            }
            for (k, (_, w)) in plan.models.iter().enumerate() {
                self.read(Input::Model(k), at.clone(), &mut x)?;
                self.read_curvature(Input::Curvature(k), at.clone(), &mut s)?;
                if self.plan.posteriors {
                    add(&mut sums, *w, &x, &s, &|_| delta);
                } else {
                    add(&mut sums, *w, &x, &s, &|i| base[i].wide() + delta);
                }
            }
            let fisher = self.plan.method == Method::Fisher;
            let all = 1.0 - rest;
            let bad = |[_, s, _]: &[f64; 3]| !(s.is_finite() && (*s > 0.0 || fisher));
            if let Some(i) = first(&sums, bad) {
                return Err(Error::parameter(
                    self.name,
                    format!(
                        "merging gives element {} a precision of {:e}, which is not positive; use smaller negative weights",
                        at.start + i,
                        sums[i][1]
                    ),
                ));
            }
            update(&mut x, &sums, |x, [sx, s, plain]| *x = T::of(if *s > 0.0 { sx / s } else { plain / all }));
            self.write(at.start, &x)?;
            update(&mut x, &sums, |x, [_, s, _]| *x = T::of(*s));
            self.output.precision(at.start, &x)?;
        }
        Ok(())
    }

    fn write(&mut self, at: usize, x: &[T]) -> Result<()> {
        if let Some(i) = first(x, |x| !x.is_finite()) {
            let problem = format!("its element {} becomes {} in the merge; use smaller weights", at + i, x[i].wide());
            return Err(Error::parameter(self.name, problem));
        }
        self.output.values(at, x)
    }
}
