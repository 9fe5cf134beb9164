//! Weight-space priors: a Gaussian without its constant, with a precision that may vanish.

use super::past::{Model, Regularizer, sum};
use crate::fisher::{DiagonalFisher, FullFisher, KroneckerFisher, LayerFactors};
use crate::linalg::{into_basis, matrix_shape};
use crate::params::Leaf;
use crate::{DiagonalGaussian, Error, FullGaussian, KroneckerGaussian, Params, Result, check};
use tch::{Kind, Tensor};

/// K(θ) = Σ ½ (θ-m)ᵀ S (θ-m), a sum of quadratic forms with S ≥ 0, on the scale of the loss summed over examples.
///
/// What the methods of weight regularization differ in is where S comes from, and around which m (t: the task just
/// learned, F: its Fisher information at θₜ, from [`Fisher`](crate::fisher::Fisher)):
///
/// | method | m | S | here |
/// |---|---|---|---|
/// | L2 to the previous weights | θₜ | δI | [`Quadratic::isotropic`] |
/// | online EWC = online Laplace: diagonal, Kronecker-factored, full | θₜ | γ Sₜ₋₁ + F | `past.scaled(γ)?.recentred(&params)?.plus(&Quadratic::from(&fisher))?`, from δI |
/// | separate EWC | each θₖ | λ Σ Fₖ | `past.plus(&Quadratic::from(&fisher).scaled(λ)?)?`, without `recentred`: still two tensors |
/// | Synaptic Intelligence | θₜ | 2cΩ | [`SynapticIntelligence`](super::SynapticIntelligence) |
/// | a posterior | its mean | its precision | `Quadratic::from(&q)` |
///
/// Separate EWC counts the past twice, compared with Bayes: θ₂ was pulled to θ₁ already (Huszár 2018). Parameters that it
/// does not name (new heads) are free.
///
/// What a sum takes: diagonal terms on the same parameter are added as natural parameters, s = s₁ + s₂ and
/// s·m = s₁m₁ + s₂m₂, with the constant that this leaves, so values are those of the sum. Full matrices around the same
/// weights are added. Kronecker products are kept as a list, a pair of factors for each task, because their sum is no
/// Kronecker product, and least of all (A₁ + A₂) ⊗ (G₁ + G₂).
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn::Module, nn::VarStore};
/// use tch_blr::continual::{Past, Quadratic};
/// use tch_blr::{Adam, Params, Rule, fisher::Fisher, nn};
/// # fn main() -> tch_blr::Result<()> {
/// # let vs = VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root(), 4, 3, Default::default());
/// # let data = |n: i64| (Tensor::randn([n, 4], (Kind::Float, Device::Cpu)), Tensor::randint(3, [n], (Kind::Int64, Device::Cpu)));
/// # let tasks = [data(30), data(50)];
/// let params = Params::from(&vs);
/// let forward = |x: &Tensor| net.forward(x);
/// let mut past = Quadratic::towards_zero(&params, 1.0)?;
/// for (x, y) in &tasks {
///     let all = Past::new().with(past.clone());
///     let mut opt = Adam::default().build(&vs, 1e-2)?;
///     for _ in 0..10 {
///         let loss = || forward(x).cross_entropy_for_logits(y);
///         opt.step(|| all.beside(loss(), x.size()[0] as f64, &params, forward))?;
///     }
///     let fisher = Fisher::exact().kronecker(&vs, [x], forward)?; // or diagonal, or full
///     past = past.recentred(&params)?.plus(&Quadratic::from(&fisher))?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Quadratic {
    terms: Vec<Term>,
    /// What completing the square has left over.
    constant: f64,
}

#[derive(Debug)]
enum Term {
    /// `mean` and `precision` in the parameter's shape.
    Diagonal { name: String, mean: Tensor, precision: Tensor },
    /// `precision` in the basis, as in [`KroneckerGaussian`].
    Kronecker { name: String, mean: Tensor, left: Option<Tensor>, right: Option<Tensor>, precision: Tensor },
    /// G ⊗ A of a layer's `[W b]`: `mean` `[out, in]` or `[out, in+1]`, `inputs` A, `outputs` G.
    Layer { weight: Shaped, bias: Option<Shaped>, mean: Tensor, inputs: Tensor, outputs: Tensor },
    /// `mean` `[n]` and `precision` `[n, n]` of all these together, in f64.
    Full { parameters: Vec<Shaped>, mean: Tensor, precision: Tensor },
}

/// Name and shape of a parameter.
type Shaped = (String, Vec<i64>);

impl Quadratic {
    /// Diagonal, from (name, m, s) of each parameter, which it copies.
    ///
    /// # Errors
    /// A name twice, shapes that differ, values that are not finite, a negative s.
    pub fn new<S: Into<String>>(entries: impl IntoIterator<Item = (S, Tensor, Tensor)>) -> Result<Self> {
        let mut terms: Vec<Term> = Vec::new();
        for (name, mean, precision) in entries {
            let name = name.into();
            if terms.iter().any(|t| matches!(t, Term::Diagonal { name: other, .. } if *other == name)) {
                return Err(Error::parameter(&name, "it is given twice"));
            }
            if mean.size() != precision.size() {
                let problem = format!("m is {:?} and s {:?}: expected one shape", mean.size(), precision.size());
                return Err(Error::parameter(&name, problem));
            }
            for (what, t) in [("m", &mean), ("s", &precision)] {
                if let Some(value) = crate::kernel::first_non_finite(t) {
                    return Err(Error::parameter(&name, format!("its {what} is not finite ({value})")));
                }
            }
            if precision.numel() > 0 && precision.min().double_value(&[]) < 0.0 {
                let smallest = precision.min().double_value(&[]);
                return Err(Error::parameter(&name, format!("its smallest s is {smallest:e}: expected numbers ≥ 0")));
            }
            terms.push(Term::Diagonal { name, mean: mean.detach().copy(), precision: precision.detach().copy() });
        }
        Ok(Quadratic { terms, constant: 0.0 })
    }

    /// ½ δ‖θ - θ_now‖² with the present weights, δ ≥ 0: "L2 to the previous weights".
    ///
    /// # Errors
    /// A δ that is negative or not finite.
    pub fn isotropic(params: impl Into<Params>, delta: f64) -> Result<Self> {
        let params = params.into();
        check::non_negative("delta", delta)?;
        let entry = |l: &Leaf| {
            let mean = l.tensor.detach().to_kind(l.state_kind());
            (l.name().to_owned(), mean.copy(), mean.full_like(delta))
        };
        Self::new(params.leaves().iter().map(entry))
    }

    /// ½ δ‖θ‖², the prior N(0, 1/δ).
    ///
    /// # Errors
    /// As [`Quadratic::isotropic`].
    pub fn towards_zero(params: impl Into<Params>, delta: f64) -> Result<Self> {
        let mut all = Self::isotropic(params, delta)?;
        for term in &mut all.terms {
            *term.mean_mut() = term.mean_mut().zeros_like();
        }
        Ok(all)
    }

    /// ½ δ_b‖θ - (δ_a/δ_b) θ_now‖²: the weight part ½δ_a‖θ - θ_now‖² of a K-prior, for the present weights trained with
    /// ½δ_a‖θ‖², when the regularizer changes to ½δ_b‖θ‖², δ_b > 0 (Khan and Swaroop 2021).
    ///
    /// # Errors
    /// A δ_a that is negative, a δ_b that is not positive, or not finite.
    pub fn change_of_regularizer(params: impl Into<Params>, delta_a: f64, delta_b: f64) -> Result<Self> {
        check::non_negative("delta_a", delta_a)?;
        check::positive("delta_b", delta_b)?;
        let mut all = Self::isotropic(params, delta_b)?;
        for term in &mut all.terms {
            *term.mean_mut() = &*term.mean_mut() * (delta_a / delta_b);
        }
        Ok(all)
    }

    /// w·K with w ≥ 0: λ of EWC, the forgetting γ, or 1/τ of a temperature.
    ///
    /// # Errors
    /// A w that is negative or not finite.
    pub fn scaled(&self, w: f64) -> Result<Self> {
        check::non_negative("w", w)?;
        let mut all = self.clone();
        for term in &mut all.terms {
            let (Term::Diagonal { precision, .. }
            | Term::Kronecker { precision, .. }
            | Term::Layer { outputs: precision, .. }
            | Term::Full { precision, .. }) = term;
            *precision = &*precision * w;
        }
        all.constant *= w;
        Ok(all)
    }

    /// The same S around the present weights: Laplace's approximation moves to the newest mode.
    ///
    /// # Errors
    /// Parameters that the model does not have in this shape, weights that are not finite.
    pub fn recentred(&self, params: impl Into<Params>) -> Result<Self> {
        let params = params.into();
        for leaf in params.leaves() {
            if let Some(value) = crate::kernel::first_non_finite(&leaf.tensor) {
                return Err(Error::parameter(leaf.name(), format!("its weights are not finite ({value})")));
            }
        }
        let mut all = self.clone();
        for term in &mut all.terms {
            let now = term.weights(&params)?.detach();
            let mean = term.mean_mut();
            *mean = now.to_kind(mean.kind()).copy();
        }
        all.constant = 0.0;
        Ok(all)
    }

    /// The sum of both.
    ///
    /// # Errors
    /// Diagonal terms on one parameter in different shapes.
    pub fn plus(&self, other: &Quadratic) -> Result<Self> {
        let mut all = self.clone();
        all.constant += other.constant;
        for term in &other.terms {
            all.add(term)?;
        }
        Ok(all)
    }

    fn add(&mut self, new: &Term) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        match new {
            Term::Diagonal { name, mean, precision } => return self.add_diagonal(name, mean, precision),
            Term::Full { parameters, mean, precision } => {
                let same = |p: &[Shaped], m: &Tensor| p == parameters && m.device() == mean.device() && m.equal(mean);
                let there = self.terms.iter_mut().find_map(|t| match t {
                    Term::Full { parameters: p, mean: m, precision: s } if same(p, m) => Some(s),
                    _ => None,
                });
                if let Some(s) = there {
                    *s = s.f_add(precision)?;
                    return Ok(());
                }
            }
            Term::Kronecker { .. } | Term::Layer { .. } => (),
        }
        self.terms.push(new.copy());
        Ok(())
    }

    fn add_diagonal(&mut self, name: &str, mean: &Tensor, precision: &Tensor) -> Result<()> {
        let there = self.terms.iter_mut().find_map(|t| match t {
            Term::Diagonal { name: other, mean, precision } if other == name => Some((mean, precision)),
            _ => None,
        });
        let Some((m, s)) = there else {
            self.terms.push(Term::diagonal(name, mean, precision));
            return Ok(());
        };
        if m.size() != mean.size() {
            return Err(Error::parameter(name, format!("shapes {:?} and {:?} differ", m.size(), mean.size())));
        }
        let wide = |t: &Tensor| t.to_kind(Kind::Double).to_device(m.device());
        let (m1, s1, m2, s2) = (wide(m), wide(s), wide(mean), wide(precision));
        let sum = &s1 + &s2;
        // m₁ + (m₂-m₁)s₂/s, which is m₁ where both know nothing
        let share = (&s2 / &sum).f_masked_fill(&sum.f_eq(0.0)?, 0.0)?;
        let apart = &m2 - &m1;
        // ½s₁(m₁-m)² + ½s₂(m₂-m)² = ½ (s₁s₂/s)(m₂-m₁)²
        self.constant += 0.5 * (&s1 * &share * apart.square()).sum(Kind::Double).double_value(&[]);
        *m = (m1 + apart * share).to_kind(m.kind());
        *s = sum.to_kind(s.kind());
        Ok(())
    }

    /// s of a parameter, summed over its diagonal terms; `None` if there is none.
    pub fn precision(&self, name: &str) -> Option<Tensor> {
        self.terms.iter().find_map(|t| match t {
            Term::Diagonal { name: other, precision, .. } if other == name => Some(precision.copy()),
            _ => None,
        })
    }

    /// m of a parameter's diagonal term; `None` if there is none.
    pub fn mean(&self, name: &str) -> Option<Tensor> {
        self.terms.iter().find_map(|t| match t {
            Term::Diagonal { name: other, mean, .. } if other == name => Some(mean.copy()),
            _ => None,
        })
    }
}

impl Term {
    /// Shares the tensors, none of which is ever written to.
    fn diagonal(name: &str, mean: &Tensor, precision: &Tensor) -> Self {
        Term::Diagonal { name: name.to_owned(), mean: mean.shallow_clone(), precision: precision.shallow_clone() }
    }

    fn copy(&self) -> Self {
        let copy = |t: &Option<Tensor>| t.as_ref().map(Tensor::shallow_clone);
        match self {
            Term::Diagonal { name, mean, precision } => Term::diagonal(name, mean, precision),
            Term::Kronecker { name, mean, left, right, precision } => Term::Kronecker {
                name: name.clone(),
                mean: mean.shallow_clone(),
                left: copy(left),
                right: copy(right),
                precision: precision.shallow_clone(),
            },
            Term::Layer { weight, bias, mean, inputs, outputs } => Term::Layer {
                weight: weight.clone(),
                bias: bias.clone(),
                mean: mean.shallow_clone(),
                inputs: inputs.shallow_clone(),
                outputs: outputs.shallow_clone(),
            },
            Term::Full { parameters, mean, precision } => Term::Full {
                parameters: parameters.clone(),
                mean: mean.shallow_clone(),
                precision: precision.shallow_clone(),
            },
        }
    }

    fn mean_mut(&mut self) -> &mut Tensor {
        let (Term::Diagonal { mean, .. }
        | Term::Kronecker { mean, .. }
        | Term::Layer { mean, .. }
        | Term::Full { mean, .. }) = self;
        mean
    }

    /// θ in the form of the mean, with its graph.
    fn weights(&self, params: &Params) -> Result<Tensor> {
        match self {
            Term::Diagonal { name, mean, .. } | Term::Kronecker { name, mean, .. } => {
                Ok(find(params, name, &mean.size())?.shallow_clone())
            }
            Term::Layer { weight: (weight, shape), bias, .. } => {
                let w = find(params, weight, shape)?.f_reshape(matrix_shape(shape))?;
                let Some((bias, shape)) = bias else { return Ok(w) };
                let b = find(params, bias, shape)?.f_unsqueeze(1)?;
                Ok(Tensor::f_cat(&[w, b], 1)?)
            }
            Term::Full { parameters, .. } => {
                let parts = parameters
                    .iter()
                    .map(|(name, shape)| Ok(find(params, name, shape)?.f_reshape([-1])?.f_to_kind(Kind::Double)?));
                Ok(Tensor::f_cat(&parts.collect::<Result<Vec<_>>>()?, 0)?)
            }
        }
    }

    /// ½ (θ-m)ᵀ S (θ-m)
    fn value(&self, params: &Params) -> Result<Tensor> {
        let theta = self.weights(params)?;
        let apart =
            |mean: &Tensor| Ok::<_, Error>(theta.f_to_kind(mean.kind())?.f_sub(&mean.to_device(theta.device()))?);
        let twice = match self {
            Term::Diagonal { mean, precision, .. } => apart(mean)?.square() * precision.to_device(theta.device()),
            Term::Kronecker { mean, left, right, precision, .. } => {
                let d = apart(mean)?.f_reshape(matrix_shape(&mean.size()))?;
                let there = |q: &Option<Tensor>| q.as_ref().map(|q| q.to_device(theta.device()));
                let d = into_basis(&d, there(left).as_ref(), there(right).as_ref())?.f_reshape(mean.size())?;
                d.square() * precision.to_device(theta.device())
            }
            Term::Layer { mean, inputs, outputs, .. } => {
                // tr(G D A Dᵀ)
                let d = apart(mean)?;
                let [a, g] = [inputs, outputs].map(|t| t.to_device(theta.device()));
                g.f_matmul(&d.f_matmul(&a)?)? * d
            }
            Term::Full { mean, precision, .. } => {
                let d = apart(mean)?;
                precision.to_device(theta.device()).f_mv(&d)? * d
            }
        };
        Ok(twice.f_sum(None::<Kind>)? * 0.5)
    }
}

/// The variable of this name, in this shape.
fn find<'a>(params: &'a Params, name: &str, shape: &[i64]) -> Result<&'a Tensor> {
    let Some(leaf) = params.find(name) else {
        return Err(Error::parameter(
            name,
            "the prior has it and the model has not; is it the prior of another model?",
        ));
    };
    if leaf.tensor.size() != shape {
        let now = leaf.tensor.size();
        return Err(Error::parameter(name, format!("the prior has shape {shape:?} and the model {now:?}")));
    }
    Ok(&leaf.tensor)
}

/// Shares the tensors, none of which is ever written to.
impl Clone for Quadratic {
    fn clone(&self) -> Self {
        Quadratic { terms: self.terms.iter().map(Term::copy).collect(), constant: self.constant }
    }
}

impl Regularizer for Quadratic {
    fn value(&self, model: &Model) -> Result<Tensor> {
        let sum = sum(self.terms.iter().map(|term| term.value(model.params)))?;
        let sum = sum.ok_or_else(|| Error::Posterior("a quadratic of no parameters".to_owned()))?;
        Ok(sum + self.constant)
    }
}

impl From<&DiagonalGaussian> for Quadratic {
    fn from(q: &DiagonalGaussian) -> Self {
        let of = |name: &str| {
            let (mean, precision) = (q.mean(name).expect("its name"), q.precision(name).expect("its name"));
            Term::Diagonal { name: name.to_owned(), mean: mean.copy(), precision: precision.copy() }
        };
        Quadratic { terms: q.names().map(of).collect(), constant: 0.0 }
    }
}

impl From<&KroneckerGaussian> for Quadratic {
    fn from(q: &KroneckerGaussian) -> Self {
        let of = |name: &str| {
            let p = q.parameter(name).expect("its name");
            Term::Kronecker {
                name: name.to_owned(),
                mean: p.mean.copy(),
                left: p.left.as_ref().map(Tensor::copy),
                right: p.right.as_ref().map(Tensor::copy),
                precision: p.precision.copy(),
            }
        };
        Quadratic { terms: q.names().map(of).collect(), constant: 0.0 }
    }
}

impl From<&FullGaussian> for Quadratic {
    fn from(q: &FullGaussian) -> Self {
        let shape = |name: &str| (name.to_owned(), q.mean(name).expect("its name").size());
        let term = Term::Full {
            parameters: q.names().map(shape).collect(),
            mean: q.mean_vector(),
            precision: q.precision().copy(),
        };
        Quadratic { terms: vec![term], constant: 0.0 }
    }
}

/// ½ (θ-m)ᵀ diag(F) (θ-m) around the weights m at which F was computed, without a prior.
impl From<&DiagonalFisher> for Quadratic {
    fn from(f: &DiagonalFisher) -> Self {
        let of = |l: &Leaf| Term::diagonal(l.name(), &l.tensor, f.get(l.name()).expect("its name"));
        Quadratic { terms: f.solution().leaves().iter().map(of).collect(), constant: 0.0 }
    }
}

/// ½ tr(G ΔV A ΔVᵀ) for every layer, with V = `[W b]`: a weight and its bias together, as they are in A. What has no factors
/// has its diagonal. Around the weights at which F was computed, without a prior.
impl From<&KroneckerFisher> for Quadratic {
    fn from(f: &KroneckerFisher) -> Self {
        let _no_grad = tch::no_grad_guard();
        let at = |name: &str| &f.solution().find(name).expect("its name").tensor;
        let shaped = |name: &str| (name.to_owned(), at(name).size());
        let layer = |l: &LayerFactors| {
            let w = at(&l.weight).reshape(matrix_shape(&at(&l.weight).size()));
            let mean =
                l.bias.as_ref().map_or_else(|| w.shallow_clone(), |b| Tensor::cat(&[&w, &at(b).unsqueeze(1)], 1));
            Term::Layer {
                weight: shaped(&l.weight),
                bias: l.bias.as_deref().map(shaped),
                inputs: l.inputs.to_kind(mean.kind()),
                outputs: l.outputs.to_kind(mean.kind()),
                mean,
            }
        };
        let layers = f.layers().iter().map(layer);
        let rest = f.names().filter_map(|name| Some(Term::diagonal(name, at(name), f.diagonal(name)?)));
        Quadratic { terms: layers.chain(rest).collect(), constant: 0.0 }
    }
}

/// ½ (θ-m)ᵀ F (θ-m) around the weights m at which F was computed, without a prior.
impl From<&FullFisher> for Quadratic {
    fn from(f: &FullFisher) -> Self {
        let leaves = f.solution().leaves();
        let flat: Vec<Tensor> = leaves.iter().map(|l| l.tensor.to_kind(Kind::Double).reshape([-1])).collect();
        let term = Term::Full {
            parameters: leaves.iter().map(|l| (l.name().to_owned(), l.tensor.size())).collect(),
            mean: Tensor::cat(&flat, 0),
            precision: f.matrix().shallow_clone(),
        };
        Quadratic { terms: vec![term], constant: 0.0 }
    }
}
