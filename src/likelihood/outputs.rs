//! A model's outputs under a likelihood, and the targets that fit them: shapes are checked here and nowhere else.

use super::Likelihood;
use crate::{Error, Result, kernel};
use tch::{Kind, Tensor};

/// The outputs z of a model on B examples.
#[derive(Debug)]
pub(crate) struct Outputs {
    /// `[B]` or `[B, C]`
    pub z: Tensor,
    pub likelihood: Likelihood,
    /// The columns that are left of the model's outputs, in order; `None` for all.
    active: Option<Vec<i64>>,
}

/// The label of an example that does not count, as in libtorch.
pub(crate) const IGNORED: i64 = -100;

pub(super) fn refuse(problem: impl Into<String>) -> Error {
    Error::Likelihood(problem.into())
}

/// Kind and shape, for messages.
fn form(t: &Tensor) -> String {
    if t.defined() { format!("{:?} {:?}", t.kind(), t.size()) } else { "undefined".to_owned() }
}

impl Outputs {
    /// Outputs `[B]` or `[B, C]` of which the columns `active` count (default all), in f64 or f32 and with their graph.
    pub(crate) fn new(likelihood: Likelihood, z: &Tensor, active: Option<&[i64]>) -> Result<Self> {
        let all = Outputs::as_is(likelihood, z)?;
        // Probabilities of half precision would not add up to one.
        let z = z.f_to_kind(if z.kind() == Kind::Double { Kind::Double } else { Kind::Float })?;
        let Some(active) = active else { return Ok(Outputs { z, ..all }) };
        let &[_, columns] = &z.size()[..] else {
            return Err(refuse(format!(
                "the outputs are {:?} and active ones are named: expected columns to choose from",
                z.size()
            )));
        };
        // A softmax over one class is constant, and has neither gradient nor curvature.
        let fewest = if likelihood == Likelihood::Categorical { 2 } else { 1 };
        if active.len() < fewest || active.iter().enumerate().any(|(i, c)| active[..i].contains(c)) {
            return Err(refuse(format!(
                "the active outputs are {active:?}: expected at least {fewest}, each of them once"
            )));
        }
        if let Some(bad) = active.iter().find(|c| !(0..columns).contains(*c)) {
            let last = columns - 1;
            return Err(refuse(format!("label {bad} is active, but the model has the outputs 0 to {last}")));
        }
        let z = z.f_index_select(1, &Tensor::from_slice(active).to_device(z.device()))?;
        Ok(Outputs { z, likelihood, active: Some(active.to_vec()) })
    }

    /// Outputs in their own kind, after a look at their shape.
    pub(crate) fn as_is(likelihood: Likelihood, z: &Tensor) -> Result<Self> {
        likelihood.validate()?;
        Self::check_shape(z)?;
        let size = z.size();
        if likelihood == Likelihood::Categorical && !matches!(size[..], [_, c] if c >= 2) {
            return Err(refuse(format!(
                "the outputs are {size:?}: a categorical likelihood needs logits [B, C] of C ≥ 2 classes; for one \
                 logit per example choose Likelihood::Bernoulli"
            )));
        }
        Ok(Outputs { z: z.shallow_clone(), likelihood, active: None })
    }

    /// Errors unless these are floating-point numbers with a row for each example, under any likelihood.
    pub(crate) fn check_shape(z: &Tensor) -> Result<()> {
        if z.defined() && z.is_floating_point() && matches!(z.dim(), 1 | 2) {
            return Ok(());
        }
        Err(refuse(format!("the outputs are {}: expected floating-point outputs [B] or [B, C]", form(z))))
    }

    /// Errors on a NaN or infinity. Reads from the device, so it is for constructors and not for every step.
    pub(crate) fn check_finite(&self) -> Result<()> {
        Self::check_finite_values(&self.z)
    }

    /// The same for outputs of any likelihood.
    pub(crate) fn check_finite_values(z: &Tensor) -> Result<()> {
        kernel::first_non_finite(&z.detach()).map_or(Ok(()), |value| {
            Err(refuse(format!(
                "the outputs are not finite ({value}); nothing was changed (look at the weights and at the batch)"
            )))
        })
    }

    /// The same outputs under another likelihood of outputs of this form.
    pub(crate) fn with(self, likelihood: Likelihood) -> Self {
        Outputs { likelihood, ..self }
    }

    /// Another handle to the same outputs.
    pub(crate) fn shallow_clone(&self) -> Self {
        Outputs { z: self.z.shallow_clone(), likelihood: self.likelihood, active: self.active.clone() }
    }

    /// With z in another kind or without its graph.
    pub(crate) fn with_values(
        self,
        f: impl FnOnce(&Tensor) -> std::result::Result<Tensor, tch::TchError>,
    ) -> Result<Self> {
        Ok(Outputs { z: f(&self.z)?, ..self })
    }

    /// Logits divided by a temperature T.
    pub(crate) fn at_temperature(self, t: f64) -> Self {
        if t == 1.0 { self } else { Outputs { z: self.z / t, ..self } }
    }

    /// Errors if what is kept for each output has another shape.
    pub(crate) fn check_same_shape(&self, kept: &Tensor) -> Result<()> {
        let (now, then) = (self.z.size(), kept.size());
        if now == then {
            return Ok(());
        }
        Err(refuse(format!(
            "the outputs are {now:?}, and predictions or targets for {then:?} were given: expected one shape; for a \
             model of other outputs, compute what is kept of the old one again"
        )))
    }

    /// B
    pub(crate) fn examples(&self) -> i64 {
        self.z.size()[0]
    }

    /// z `[B, C]` without its graph, C = 1 for outputs `[B]`.
    pub(super) fn matrix(&self) -> Result<Tensor> {
        let z = self.z.detach();
        Ok(if z.dim() == 1 { z.f_unsqueeze(1)? } else { z })
    }

    /// Errors unless targets are classes `[B]` of kind i64 (categorical), or values in the shape of z, which for a
    /// Bernoulli likelihood are probabilities.
    pub(crate) fn check_targets(&self, y: &Tensor) -> Result<()> {
        let size = self.z.size();
        let (fits, expected) = match self.likelihood {
            Likelihood::Categorical => {
                (y.kind() == Kind::Int64 && y.size() == size[..1], format!("classes Int64 {:?}", &size[..1]))
            }
            _ => (y.size() == size, format!("{size:?}, the shape of the outputs")),
        };
        if !fits {
            let (y, z) = (form(y), form(&self.z));
            return Err(refuse(format!("the targets are {y} and the outputs {z}: expected {expected}")));
        }
        // Booleans are 0 and 1, and libtorch compares no empty tensors.
        if self.likelihood == Likelihood::Bernoulli && y.kind() != Kind::Bool && y.numel() > 0 {
            let (least, largest) = (y.f_min()?.f_double_value(&[])?, y.f_max()?.f_double_value(&[])?);
            if !(least >= 0.0 && largest <= 1.0) {
                return Err(refuse(format!(
                    "the targets are from {least} to {largest}: expected probabilities of y = 1, from 0 to 1; labels \
                     of -1 and 1 are (y + 1)/2"
                )));
            }
        }
        Ok(())
    }

    /// Which classes `[B]` of categorical outputs `[B, C]` count, `[B]`: all but [`IGNORED`]; `None` if that is all.
    pub(crate) fn counted(&self, y: &Tensor) -> Result<Option<Tensor>> {
        let classes = self.z.size()[1];
        if y.numel() == 0 {
            return Ok(None);
        }
        // Before libtorch sees it, whose message names no example, and whose kernels on a GPU end the process. One read,
        // which is all that the usual labels cost.
        let ends = Tensor::f_stack(&[y.f_min()?, y.f_max()?], 0)?.f_to_device(tch::Device::Cpu)?;
        if ends.int64_value(&[0]) >= 0 && ends.int64_value(&[1]) < classes {
            return Ok(None);
        }
        let counted = y.f_ne(IGNORED)?;
        let wrong = y.f_lt(0)?.f_logical_or(&y.f_ge(classes)?)?.f_logical_and(&counted)?;
        if wrong.f_any()?.int64_value(&[]) != 0 {
            let at = wrong.to_kind(Kind::Int64).argmax(0, false).int64_value(&[]);
            let (class, last) = (y.int64_value(&[at]), classes - 1);
            return Err(refuse(format!(
                "example {at} has class {class}, and the model has the outputs 0 to {last}: expected one of them, or \
                 {IGNORED} for an example that is to be left out"
            )));
        }
        Ok(Some(counted))
    }

    /// Targets in the form of predictions, in the shape and kind of z: classes become rows of zeros and a one, and
    /// count as labels of the whole model where active outputs are named.
    pub(crate) fn targets(&self, y: Option<&Tensor>) -> Result<Tensor> {
        let Some(y) = y.filter(|y| y.defined()) else { return Err(no_targets()) };
        self.check_targets(y)?;
        if self.likelihood != Likelihood::Categorical {
            return Ok(y.f_to_device(self.z.device())?.f_to_kind(self.z.kind())?);
        }
        let all: Vec<i64> = (0..self.z.size()[1]).collect();
        let active = self.active.as_ref().unwrap_or(&all);
        // Not `one_hot`, whose columns are always the classes from 0 on.
        let hot = y.f_unsqueeze(1)?.f_eq_tensor(&Tensor::from_slice(active).to_device(y.device()))?;
        let found = hot.f_any_dim(1, false)?;
        if found.all().int64_value(&[]) == 0 {
            // Only on the way to an error; argmin of booleans does not exist.
            let at = found.to_kind(Kind::Int64).argmin(0, false).int64_value(&[]);
            let class = y.int64_value(&[at]);
            return Err(refuse(format!(
                "example {at} has class {class}, which is not one of the active outputs {active:?}; leave such \
                 examples out, or name all classes of the task by active(..)"
            )));
        }
        Ok(hot.f_to_device(self.z.device())?.f_to_kind(self.z.kind())?)
    }
}

pub(crate) fn no_targets() -> Error {
    refuse(
        "there are no targets: give batches of (inputs, targets), or a memory its .targets(..); classes [B] of kind \
         Int64 for a categorical likelihood, and values in the shape of the outputs for the others",
    )
}
