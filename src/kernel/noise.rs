//! Standard normal noise as a function of a position, not of a generator's state.
//!
//! A draw is identified by (seed, step, sample, position of the weight). So it can be repeated instead of stored,
//! resumed without saving a generator, and does not depend on the order or number of threads that produce it.
//!
//! Here belong where the noise comes from and which draw is meant. The random bits are made in `philox.rs` and the
//! normals in `normal.rs`.

use super::Field;
use super::philox::{keys, philox};
use crate::{Error, Result};
use tch::{Device, Kind, Tensor};

/// Where an optimizer's standard normals come from; see [`Builder::noise`](crate::Builder::noise). Parallel chains take a
/// generator each, [`Philox::fold_in`]; the ranks of [`Builder::parallel`](crate::Builder::parallel) share one.
#[derive(Debug)]
#[non_exhaustive]
pub enum Noise {
    /// A counter-based generator.
    Philox(Philox),
    /// Tensors given in advance, to replay a published trajectory.
    Given(Given),
}

/// The counter-based generator Philox4x32-10 with a 64-bit key (Salmon et al., SC 2011), and Box and Muller's
/// transform.
///
/// A normal is a function of (seed, step, sample, position of the weight). So nothing is stored to resume, and the
/// number of threads does not matter. CPU and CUDA agree to the rounding of log, sin and cos.
///
/// Processes that draw side by side, each with an optimizer of its own, need a generator each, or they all draw the same:
/// `Philox { seed }.fold_in(rank)`. The ranks of one training ([`Builder::parallel`](crate::Builder::parallel)) have one, and
/// take turns in the samples of each step: draw k of rank r is sample kR+r.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Philox {
    /// The key. Different seeds give independent streams; [`Philox::fold_in`] makes one from another and a number.
    pub seed: u64,
}

/// Standard normals given in advance as `noise[step][sample][parameter]`, all counted from 0, each of its parameter's
/// shape, parameters in the order of [`Params::names`](crate::Params::names). With antithetic sampling one sample
/// serves a pair. Not part of a checkpoint.
#[derive(Debug)]
pub struct Given(pub Vec<Vec<Vec<Tensor>>>);

impl From<Philox> for Noise {
    fn from(p: Philox) -> Self {
        Noise::Philox(p)
    }
}

impl From<Given> for Noise {
    fn from(g: Given) -> Self {
        Noise::Given(g)
    }
}

impl Philox {
    /// A seed drawn from libtorch's global generator, so that [`tch::manual_seed`] makes it reproducible.
    pub(crate) fn from_libtorch() -> Self {
        // Two halves, because the bound is an i64, which cannot be 2⁶⁴.
        let words = Tensor::randint(1 << 32, [2], (Kind::Int64, Device::Cpu));
        Philox { seed: (words.int64_value(&[0]) as u64) << 32 | words.int64_value(&[1]) as u64 }
    }

    /// The generator of one process or chain among several, whose number is `data`.
    ///
    /// ```
    /// use tch_blr::Philox;
    /// let of = |rank| Philox { seed: 7 }.fold_in(rank);
    /// assert_eq!(of(3), of(3));
    /// assert_ne!(of(3), of(4));
    /// ```
    ///
    /// The new key is 64 of the 128 bits that the Philox block function, under the old key, gives at a counter made of
    /// `data`. Any u64 will do: 0 is a number like any other, and does not give back the generator it is made from.
    /// Calls can be chained, for instance for a chain on a rank: `p.fold_in(rank).fold_in(chain)`; the order counts.
    ///
    /// * **Certain:** the result is a function of (seed, data) alone. It lies in `seed`, so an optimizer's checkpoint
    ///   holds it, and whoever loads that file goes on with *its* noise: each rank has to load the file that it
    ///   saved.
    /// * **Probable:** keys differ. As 64 random bits each, of R of them some two are equal with probability ≤ R²/2⁶⁵
    ///   (3·10⁻¹⁴ at R = 1000), and those two would draw the same.
    /// * **Not proven:** that streams of different keys are independent. It is what Philox was designed and tested for
    ///   (Salmon et al., SC 2011), and `tests/normals.rs` looks for correlations between them.
    ///
    /// Noise never uses the blocks that keys are made from, unless a step has 2³² samples.
    #[must_use]
    pub fn fold_in(self, data: u64) -> Self {
        // A draw's counter is (48 bits of position, 48 of step, 32 of sample). That uses up all 128 bits, so no value
        // is left for keys alone; they take the last sample, and a part of its steps.
        let counter = [data as u32, (data >> 32) as u32, KEYS, u32::MAX].map(|word| [word]);
        let [[low], [high], ..] = philox(counter, &keys(self.seed));
        Philox { seed: u64::from(high) << 32 | u64::from(low) }
    }
}

/// The position of one parameter's noise.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Draw {
    pub step: u64,
    pub sample: u64,
    /// Index of the parameter.
    pub parameter: usize,
    /// Number of groups of normals before the parameter.
    pub group: u64,
}

/// The noise of one parameter: where it will be generated, or what it is.
#[derive(Debug)]
pub(crate) enum Drawn {
    Counter { seed: u64, at: Draw },
    Tensor(Tensor),
}

impl Drawn {
    /// As a tensor like `like`.
    pub(crate) fn tensor(self, like: &Tensor) -> Result<Tensor> {
        match self {
            Drawn::Counter { seed, at } => super::normals(seed, at, like),
            Drawn::Tensor(z) => Ok(z),
        }
    }

    /// As an input of the kernel.
    pub(crate) fn field(&self) -> Field<'_> {
        match self {
            Drawn::Counter { seed, at } => Field::Noise { seed: *seed, at: *at },
            Drawn::Tensor(z) => Field::Tensor(z),
        }
    }
}

/// Third word of the counters that [`Philox::fold_in`] uses, where draws have the low half of the step.
const KEYS: u32 = u32::from_be_bytes(*b"fold");

/// How many steps have noise of their own: a counter has 48 bits for the step.
pub(crate) const STEPS: u64 = 1 << 48;

impl Noise {
    /// Standard normals for a parameter.
    pub(crate) fn draw(&self, at: Draw, like: &Tensor) -> Result<Drawn> {
        let z = match self {
            Noise::Philox(p) => return Ok(Drawn::Counter { seed: p.seed, at }),
            Noise::Given(Given(z)) => z,
        };
        let (step, sample) = (at.step as usize, at.sample as usize);
        let z = z.get(step).and_then(|s| s.get(sample)).and_then(|s| s.get(at.parameter)).ok_or_else(|| {
            Error::Noise(format!(
                "nothing was given for step {step}, sample {sample}, parameter {} (counted from 0)",
                at.parameter
            ))
        })?;
        if z.size() != like.size() {
            return Err(Error::Noise(format!(
                "shape {:?} was given for step {step}, sample {sample}, parameter {}: expected {:?}",
                z.size(),
                at.parameter,
                like.size()
            )));
        }
        // Contiguous, because one input in another layout would send the whole job to the tensor back-end.
        Ok(Drawn::Tensor(z.to_kind(like.kind()).to_device(like.device()).contiguous()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Philox4x32-10 written down from its definition, one number after the other: with L and R the halves of a
    /// block, a round multiplies each half's first word and mixes the high part into the other half.
    fn one_block(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
        (0..10).fold(counter, |[l0, r0, l1, r1], round| {
            let key = [(key[0], 0x9E37_79B9_u64), (key[1], 0xBB67_AE85)]
                .map(|(k, weyl)| ((u64::from(k) + round * weyl) % (1 << 32)) as u32);
            let [p0, p1] = [u64::from(l0) * 0xD251_1F53, u64::from(l1) * 0xCD9E_8D57];
            let split = |p: u64| ((p / (1 << 32)) as u32, (p % (1 << 32)) as u32);
            let ((high0, low0), (high1, low1)) = (split(p0), split(p1));
            [high1 ^ r0 ^ key[0], low1, high0 ^ r1 ^ key[1], low0]
        })
    }

    #[test]
    fn folding_in_is_the_block_function_at_a_counter_of_its_own() {
        // One of the published answers first, for the definition above.
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        let answer = [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1];
        assert_eq!(one_block(pi, [0xa409_3822, 0x299f_31d0]), answer);
        for (seed, data) in [(0, 0), (42, 1), (u64::MAX, u64::MAX), (0x299f_31d0_a409_3822, 0x85a3_08d3_243f_6a88)] {
            let [seed_low, seed_high, low, high] = [seed, seed >> 32, data, data >> 32].map(|x| x as u32);
            let [k0, k1, ..] = one_block([low, high, 0x666F_6C64, 0xFFFF_FFFF], [seed_low, seed_high]);
            assert_eq!(Philox { seed }.fold_in(data).seed, u64::from(k0) + u64::from(k1) * (1 << 32), "{seed} {data}");
        }
    }

    /// Each two of the 3·2¹⁶ + 1 keys below are equal with probability 2⁻⁶⁴: altogether 10⁻⁹.
    #[test]
    fn ranks_have_seeds_of_their_own() {
        let (p, ranks) = (Philox { seed: 42 }, 1 << 16);
        let near = (0..ranks).map(|rank| p.fold_in(rank));
        let far = (0..ranks).map(|rank| p.fold_in(rank << 32 | 1 << 31));
        let nested = (0..ranks).map(|i| p.fold_in(i / 256).fold_in(i % 256));
        let seeds: std::collections::HashSet<u64> = near.chain(far).chain(nested).chain([p]).map(|p| p.seed).collect();
        assert_eq!(seeds.len() as u64, 3 * ranks + 1);
        assert_ne!(p.fold_in(1).fold_in(2), p.fold_in(2).fold_in(1));
        // The bits of the keys are balanced: each is set in half of the ranks, within 5 of its standard errors.
        for bit in 0..64 {
            let set = (0..ranks).filter(|rank| p.fold_in(*rank).seed >> bit & 1 == 1).count() as f64;
            assert!((set - ranks as f64 / 2.0).abs() < 5.0 * (ranks as f64 / 4.0).sqrt(), "bit {bit}: {set}");
        }
    }

    #[test]
    fn given_noise_is_checked() {
        let z = Given(vec![vec![vec![Tensor::from_slice(&[1.0, 2.0])]]]);
        let like = Tensor::zeros([2], (Kind::Float, Device::Cpu));
        let first = Draw { step: 0, sample: 0, parameter: 0, group: 0 };
        let noise = Noise::from(z);
        let Ok(Drawn::Tensor(got)) = noise.draw(first, &like) else { panic!("given noise is a tensor") };
        assert_eq!(
            (got.kind(), Vec::<f64>::try_from(got.to_kind(Kind::Double)).unwrap()),
            (Kind::Float, vec![1.0, 2.0])
        );
        let missing = noise.draw(Draw { sample: 1, ..first }, &like).unwrap_err();
        assert!(missing.to_string().contains("sample 1"), "{missing}");
        let shape = noise.draw(first, &like.narrow(0, 0, 1)).unwrap_err();
        assert!(shape.to_string().contains("expected [1]"), "{shape}");
    }
}
