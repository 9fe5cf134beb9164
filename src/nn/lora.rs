//! z = x Wᵀ + b + (α/r) (x Aᵀ) Bᵀ, where W and b stay as they are.

use super::Linear;
use crate::{Error, Result, check};
use std::borrow::Borrow;
use tch::nn::{Init, Module, Path};
use tch::{Device, Kind, Tensor};

/// The size of a [`LoraLinear`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraConfig {
    /// r, the rank of the change, from 1 to the smaller of the base's two dimensions; default 8.
    pub rank: i64,
    /// α > 0; the change is (α/r) B A. Default 16.
    pub alpha: f64,
}

impl Default for LoraConfig {
    fn default() -> Self {
        LoraConfig { rank: 8, alpha: 16.0 }
    }
}

/// A fully connected layer whose weight is W + (α/r) B A, with W fixed and the factors A and B of low rank to be
/// learned (LoRA).
///
/// The factors belong to a store of their own, which is all that an optimizer is given: `Params::from(&adapters)`, or
/// `&adapters`, has r·(in + out) weights for a layer, and nothing of the base is sampled, decayed or saved. The base
/// gets no gradients from here, frozen or not. The factors are layers that can be tapped, so that rows with per-example
/// curvature train them as well.
///
/// ```
/// use tch::{Device, Kind, Tensor, nn::Module, nn::VarStore};
/// use tch_blr::nn::{self, LoraConfig};
/// use tch_blr::Ivon;
/// # fn main() -> tch_blr::Result<()> {
/// let mut base = VarStore::new(Device::Cpu);
/// let layer = nn::linear(base.root() / "layer", 20, 10, Default::default());
/// // load or train it, then:
/// base.freeze();
/// let adapters = VarStore::new(Device::Cpu);
/// let config = LoraConfig { rank: 2, alpha: 4.0 };
/// let adapted = nn::lora_linear(adapters.root() / "layer", &layer, config)?;
/// # let x = Tensor::randn([8, 20], (Kind::Float, Device::Cpu));
/// # let y = Tensor::zeros([8], (Kind::Int64, Device::Cpu));
/// assert_eq!(adapted.forward(&x), layer.forward(&x)); // B starts at 0
///
/// let mut opt = Ivon::default().ess(1000.0).hess_init(0.1).build(&adapters, 0.1)?;
/// opt.step(|| adapted.forward(&x).cross_entropy_for_logits(&y))?;
/// assert_eq!(opt.posterior()?.len(), 2 * (20 + 10));
///
/// let merged = adapted.merged()?; // for a program that knows nothing of adapters
/// assert!((merged.forward(&x) - adapted.forward(&x)).abs().max().double_value(&[]) < 1e-5);
/// # Ok(())
/// # }
/// ```
///
/// Base and factors may be of different kinds: with a base of bf16 or f16 and factors of f32 (the kind of their store),
/// x is converted for the factors and their product to the kind of the base's output.
///
/// (cA, B/c) is the same layer for any c ≠ 0, but not the same point of a Gaussian over A and B: averages of factors
/// mean nothing; average or merge the products, [`LoraLinear::delta`]. `docs/adapters.md` has more.
///
/// Source: Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models* (arXiv:2106.09685).
#[derive(Debug)]
pub struct LoraLinear {
    /// W `[out, in]` and b `[out]`, another handle to the base's.
    pub base: Linear,
    /// A `[r, in]`, the variable `lora_A.weight`; starts uniform within ±1/√in.
    pub a: Linear,
    /// B `[out, r]`, the variable `lora_B.weight`; starts at 0, so that the layer starts as its base.
    pub b: Linear,
    /// α/r
    scale: f64,
}

/// Creates the factors of a layer at this path, which is one of a store other than that of `base`: a [`Linear`] or a
/// [`tch::nn::Linear`]. Names are those of PEFT, so that `adapters.save("adapter_model.safetensors")` can be merged by
/// programs that know its files.
///
/// # Errors
/// A rank or an α out of range; factors that this path has already; a base whose weight is not a matrix of floats, whose
/// bias does not fit it, or that is on another device than the store. Nothing is created then.
pub fn lora_linear<'a, T: Borrow<Path<'a>>>(vs: T, base: impl Into<Linear>, c: LoraConfig) -> Result<LoraLinear> {
    let (vs, base) = (vs.borrow(), base.into());
    let path = vs.components().collect::<Vec<_>>().join(".");
    let name = if path.is_empty() { "weight".to_owned() } else { path };
    let (out, inputs) = shape(&name, vs.device(), &base)?;
    if !(1..=out.min(inputs)).contains(&c.rank) {
        return Err(Error::HyperParameter {
            name: "rank",
            value: format!("{} for a base of [{out}, {inputs}]", c.rank),
            expected: "1 to the smaller of its two dimensions",
        });
    }
    check::positive("alpha", c.alpha)?;
    // A second variable of a name would get another name, which no program knows.
    if ["lora_A", "lora_B"].iter().any(|factor| (vs / factor).get("weight").is_some()) {
        return Err(Error::parameter(&name, "it has factors already: give every layer a path of its own"));
    }
    let bound = 1.0 / (inputs as f64).sqrt();
    let a = (vs / "lora_A").f_var("weight", &[c.rank, inputs], Init::Uniform { lo: -bound, up: bound })?;
    let b = (vs / "lora_B").f_var("weight", &[out, c.rank], Init::Const(0.0))?;
    let [a, b] = [a, b].map(|ws| Linear { ws, bs: None });
    Ok(LoraLinear { base, a, b, scale: c.alpha / c.rank as f64 })
}

/// (out, in) of a base that factors of this name and device can have.
fn shape(name: &str, device: Device, base: &Linear) -> Result<(i64, i64)> {
    let refuse = |problem: String| Err(Error::parameter(name, problem));
    let size = base.ws.size();
    let [out, inputs] = size[..] else {
        return refuse(format!("the base's weight has shape {size:?}: expected a matrix [out, in]"));
    };
    if !base.ws.is_floating_point() {
        return refuse(format!("the base's weight is {:?}: expected floats; convert it first", base.ws.kind()));
    }
    if let Some(bias) = base.bs.as_ref().filter(|bias| bias.size() != [out]) {
        return refuse(format!("the base's bias has shape {:?}: expected [{out}]", bias.size()));
    }
    let place = (base.ws.kind(), base.ws.device());
    if let Some(bias) = base.bs.as_ref().filter(|bias| (bias.kind(), bias.device()) != place) {
        let other = (bias.kind(), bias.device());
        return refuse(format!("the base's bias is {other:?} and its weight {place:?}: convert or move one of them"));
    }
    if base.ws.device() != device {
        let (theirs, ours) = (base.ws.device(), device);
        return refuse(format!("the base is on {theirs:?} and the store of its factors on {ours:?}: move one of them"));
    }
    Ok((out, inputs))
}

impl LoraLinear {
    /// (α/r) B A `[out, in]`, what is added to W, in f64 and without a graph.
    ///
    /// A and B are independent under a diagonal posterior, so that at its mean this is the mean of the change, and the
    /// variance of the change of weight (i, j) is (α/r)² Σₖ ( σ²(Bᵢₖ)(Aₖⱼ² + σ²(Aₖⱼ)) + Bᵢₖ² σ²(Aₖⱼ) ).
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn delta(&self) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let wide = |t: &Tensor| t.f_to_kind(Kind::Double);
        Ok(wide(&self.b.ws)?.f_matmul(&wide(&self.a.ws)?)?.f_mul_scalar(self.scale)?)
    }

    /// The layer with the weight W + (α/r) B A, in the kind of W and rounded once: a copy, which follows neither the
    /// base nor the factors.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn merged(&self) -> Result<Linear> {
        let _no_grad = tch::no_grad_guard();
        let Linear { ws, bs } = &self.base;
        let sum = ws.f_to_kind(Kind::Double)?.f_add(&self.delta()?)?;
        Ok(Linear { ws: sum.f_to_kind(ws.kind())?, bs: bs.as_ref().map(|bias| bias.detach().copy()) })
    }

    /// α/r
    pub fn scale(&self) -> f64 {
        self.scale
    }
}

impl Module for LoraLinear {
    fn forward(&self, xs: &Tensor) -> Tensor {
        // Detached here and not when it is created: a store that is moved or converted gives its variables other
        // memory, which a detached handle does not follow.
        let bias = self.base.bs.as_ref().map(Tensor::detach);
        let z = xs.linear(&self.base.ws.detach(), bias.as_ref());
        // The factor α/r where it is multiplied with the fewest numbers.
        let low = self.a.forward(&xs.to_kind(self.a.ws.kind())) * self.scale;
        let kind = z.kind();
        z + self.b.forward(&low).to_kind(kind)
    }
}
