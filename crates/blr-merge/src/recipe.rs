//! To which tensors a method is applied: what their names say that they are for, and what the user says.

use crate::engine::Plan;
use crate::{Error, Method, Result};

/// A [`Method`], and to which tensors it is applied. A method alone converts into the recipe without further wishes.
///
/// | tensor | result |
/// |---|---|
/// | `running_mean`, `running_var` | the average, by the weights that are positive, whatever the method |
/// | `num_batches_tracked`, integers, booleans | the base's, or the first model's |
/// | factors of LoRA and its like (`lora_A`, `lora_B`, …) | refused, unless [`Recipe::factors`] |
/// | left out ([`Recipe::include`], [`Recipe::exclude`]) | the base's, or the first model's |
/// | everything else | by the method, or that of [`Recipe::method_for`]; by the weights, or those of [`Recipe::weights_for`] |
///
/// The first two are the buffers of batch normalization: data, not weights. A sum of differences can make a variance
/// negative. Even their average is not the statistics of the merged network: where there are data, run them through it
/// once in training mode.
///
/// The product of two averages is not the average of two products: merged factor by factor, two adapters that both
/// work may give one that does neither's task. Multiply the factors first, and merge the products:
/// [`FileModel::adapter`](crate::FileModel::adapter).
///
/// A pattern must fit a whole name. `*` stands for any characters, `?` for one, `[0-3a]` for one of these, `[!0-3a]`
/// for one that is none of these.
///
/// ```
/// use blr_merge::{Method, Recipe};
/// let recipe = Recipe::new(Method::task_arithmetic(0.5)).exclude("*.bias").exclude("lm_head.*");
/// let recipe = recipe.method_for("layers.[0-3].*", Method::task_arithmetic(1.0)).weights_for("*.mlp.*", [1.0, 0.0]);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    pub(crate) method: Method,
    include: Vec<Pattern>,
    exclude: Vec<Pattern>,
    factors: bool,
    pub(crate) tied: Vec<(String, String)>,
    methods: Vec<(Pattern, Method)>,
    weights: Vec<(Pattern, Vec<f64>)>,
}

impl From<Method> for Recipe {
    fn from(method: Method) -> Self {
        Recipe {
            method,
            include: Vec::new(),
            exclude: Vec::new(),
            factors: false,
            tied: Vec::new(),
            methods: Vec::new(),
            weights: Vec::new(),
        }
    }
}

/// A pattern of names; one that is none fits no name, and [`Recipe::check`] says so.
#[derive(Debug, Clone, PartialEq)]
struct Pattern {
    text: String,
    parsed: Option<glob::Pattern>,
}

impl Pattern {
    fn new(text: impl Into<String>) -> Self {
        let text = text.into();
        let parsed = glob::Pattern::new(&text).ok();
        Pattern { text, parsed }
    }

    fn fits(&self, name: &str) -> bool {
        self.parsed.as_ref().is_some_and(|pattern| pattern.matches(name))
    }
}

/// What becomes of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// It is merged by the method.
    Weight,
    /// It is averaged, whatever the method ([`Plan::average`](crate::engine::Plan::average)).
    Statistic,
    /// It is that of the base or, without one, of the first model.
    Kept,
}

impl Recipe {
    /// The method for every tensor whose name does not say that it is something else.
    pub fn new(method: Method) -> Self {
        method.into()
    }

    /// The method.
    pub fn method(&self) -> Method {
        self.method
    }

    /// Only tensors whose name fits this pattern, or another one that is given so. The others are copied and may differ
    /// between the models. Default: all.
    #[must_use]
    pub fn include(mut self, pattern: impl Into<String>) -> Self {
        self.include.push(Pattern::new(pattern));
        self
    }

    /// Without the tensors whose name fits this pattern (as [`Recipe::include`], over which it prevails): they
    /// are copied, and may differ between the models.
    #[must_use]
    pub fn exclude(mut self, pattern: impl Into<String>) -> Self {
        self.exclude.push(Pattern::new(pattern));
        self
    }

    /// Whether factors of adapters are merged like weights; default no.
    #[must_use]
    pub fn factors(mut self, merged: bool) -> Self {
        self.factors = merged;
        self
    }

    /// In files that lack the tensor `name`, that of the name `of` stands for it: a head that is tied to the embedding,
    /// which some programs do not write again. The result has both. For files only.
    #[must_use]
    pub fn tied(mut self, name: impl Into<String>, of: impl Into<String>) -> Self {
        self.tied.push((name.into(), of.into()));
        self
    }

    /// Another method for the tensors whose name fits this pattern; of several patterns that fit, the last one given
    /// decides. All methods of a recipe must be ones with curvature, or none.
    #[must_use]
    pub fn method_for(mut self, pattern: impl Into<String>, method: Method) -> Self {
        self.methods.push((Pattern::new(pattern), method));
        self
    }

    /// Other weights w_k, one for each model, for the tensors whose name fits this pattern; of several patterns that
    /// fit, the last one given decides.
    #[must_use]
    pub fn weights_for(mut self, pattern: impl Into<String>, weights: impl Into<Vec<f64>>) -> Self {
        self.weights.push((Pattern::new(pattern), weights.into()));
        self
    }

    /// Whether any of the methods starts from a base model.
    pub fn needs_base(&self) -> bool {
        self.method.needs_base() || self.methods.iter().any(|(_, method)| method.needs_base())
    }

    /// Whether the methods need curvature ([`Method::needs_curvature`]).
    pub fn needs_curvature(&self) -> bool {
        self.method.needs_curvature()
    }

    /// Checks all that can be checked before the tensors' names are known, for models of these names and weights.
    ///
    /// # Errors
    /// Those of [`Method::validate`]; [`Error::Merge`] for weights of a pattern that are not one for each model, and
    /// for methods with curvature beside others.
    pub fn validate(&self, models: &[(&str, f64)]) -> Result<()> {
        self.method.validate(models)?;
        for (pattern, method) in &self.methods {
            if method.needs_curvature() != self.method.needs_curvature() {
                let problem = format!(
                    "of `{}` and `{method}` (for `{}`), one needs curvature and one does not: all must, or none",
                    self.method, pattern.text
                );
                return Err(Error::Merge(problem));
            }
        }
        for (pattern, weights) in &self.weights {
            if weights.len() != models.len() {
                let (n, models) = (weights.len(), models.len());
                let problem =
                    format!("for `{}` there are {n} weights, and {models} models: give one for each", pattern.text);
                return Err(Error::Merge(problem));
            }
        }
        Ok(())
    }

    /// How the tensor of this name is merged, from models of these names and weights.
    ///
    /// # Errors
    /// Those of [`Method::validate`], with the tensor's name if it has a method or weights of its own.
    pub fn plan<'a>(&self, name: &str, models: &[(&'a str, f64)], posteriors: bool) -> Result<Plan<'a>> {
        let method = self.methods.iter().rev().find(|(pattern, _)| pattern.fits(name)).map(|(_, method)| *method);
        let weights = self.weights.iter().rev().find(|(pattern, _)| pattern.fits(name)).map(|(_, weights)| weights);
        let own = method.is_some() || weights.is_some();
        let mut models = models.to_vec();
        if let Some(weights) = weights {
            models.iter_mut().zip(weights).for_each(|((_, w), own)| *w = *own);
        }
        let plan = Plan { method: method.unwrap_or(self.method), models, posteriors };
        plan.method.validate(&plan.models).map_err(|e| if own { Error::parameter(name, e.to_string()) } else { e })?;
        Ok(plan)
    }

    /// What becomes of the tensor of this name.
    ///
    /// # Errors
    /// [`Error::Parameter`] for the factor of an adapter, unless these are left out or wanted.
    pub fn role(&self, name: &str) -> Result<Role> {
        let included = self.include.is_empty() || self.include.iter().any(|pattern| pattern.fits(name));
        if !included || self.exclude.iter().any(|pattern| pattern.fits(name)) {
            return Ok(Role::Kept);
        }
        match name.rsplit('.').next() {
            Some("running_mean" | "running_var") => Ok(Role::Statistic),
            Some("num_batches_tracked") => Ok(Role::Kept),
            _ if is_factor(name) && !self.factors => Err(Error::parameter(
                name,
                "it is a factor of a low-rank adapter, and the product of averages is not the average of the products: \
                 give the adapter's file together with its base's (adapter), leave it out (exclude), or ask for it \
                 (factors)",
            )),
            _ => Ok(Role::Weight),
        }
    }

    /// Checks that every pattern is one and fits some name: one that fits none is misspelt.
    ///
    /// # Errors
    /// [`Error::Merge`] with the first pattern that fits none.
    pub fn check(&self, names: &[&str]) -> Result<()> {
        let own =
            self.methods.iter().map(|(pattern, _)| pattern).chain(self.weights.iter().map(|(pattern, _)| pattern));
        for pattern in self.include.iter().chain(&self.exclude).chain(own) {
            let text = &pattern.text;
            if let Err(e) = glob::Pattern::new(text) {
                return Err(Error::Merge(format!("`{text}` is not a pattern: {} at character {}", e.msg, e.pos + 1)));
            }
            if !names.iter().any(|name| pattern.fits(name)) {
                return Err(Error::Merge(format!(
                    "no tensor's name fits the pattern `{text}`: it must fit all of a name, with * for any characters"
                )));
            }
        }
        Ok(())
    }
}

/// Whether the name is one that adapters have for the factors of a product: PEFT's and torchtune's A and B, kohya's and
/// diffusers' up and down, and those of the other products of LyCORIS.
fn is_factor(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let mut last = "";
    name.split('.').any(|part| {
        let pair = (std::mem::replace(&mut last, part), part);
        let alone = ["lora_a", "lora_b", "lora_up", "lora_down", "lora_embedding_a", "lora_embedding_b"];
        alone.contains(&part)
            || part.starts_with("hada_w")
            || part.starts_with("lokr_w")
            || (pair.0 == "lora" || pair.0.ends_with("_lora")) && matches!(part, "up" | "down" | "a" | "b")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_whole_names() {
        for (pattern, name, expected) in [
            ("w", "w", true),
            ("w", "ww", false),
            ("*", "", true),
            ("", "", true),
            ("", "w", false),
            ("?", "", false),
            ("?", "é", true),
            ("*.bias", "layer.0.bias", true),
            ("*.bias", "layer.0.bias_hh", false),
            ("layer.?.*", "layer.1.weight", true),
            ("layer.?.*", "layer.11.weight", false),
            ("*a*b", "xaxbxab", true),
            ("*a*b", "xaxbxa", false),
            ("a*a", "a", false),
            ("a/*", "a/b/c", true),
            ("layer.[0-3].*", "layer.3.weight", true),
            ("layer.[0-3].*", "layer.4.weight", false),
            ("layer.[!0-3].*", "layer.4.weight", true),
            ("[a]", "a", true),
            ("[[]a]", "[a]", true),
            ("A", "a", false),
        ] {
            assert_eq!(Pattern::new(pattern).fits(name), expected, "{pattern} {name}");
        }
        // Not exponential in the number of stars.
        assert!(!Pattern::new("*a".repeat(1000)).fits(&"a".repeat(999)));
        assert!(!Pattern::new("*a".repeat(30) + "*b").fits(&"a".repeat(3000)));
        for wrong in ["[a", "a**b", "***"] {
            let e = Recipe::new(Method::linear()).exclude(wrong).check(&["a"]).unwrap_err().to_string();
            assert!(e.contains(&format!("`{wrong}` is not a pattern")), "{e}");
        }
    }

    #[test]
    fn the_last_rule_that_fits_decides() {
        let recipe = Recipe::new(Method::task_arithmetic(1.0))
            .method_for("a.*", Method::task_arithmetic(2.0))
            .method_for("a.b", Method::linear())
            .weights_for("*", [1.0, 2.0])
            .weights_for("a.*", [3.0, -3.0]);
        let models = [("x", 1.0), ("y", 1.0)];
        recipe.validate(&models).unwrap();
        let plan = |name: &str| recipe.plan(name, &models, false).map(|plan| (plan.method, plan.models));
        assert_eq!(plan("c").unwrap(), (Method::task_arithmetic(1.0), vec![("x", 1.0), ("y", 2.0)]));
        assert_eq!(plan("a.c").unwrap(), (Method::task_arithmetic(2.0), vec![("x", 3.0), ("y", -3.0)]));
        // A rule's method and its weights may not fit together, which is said with the tensor's name.
        let e = plan("a.b").unwrap_err().to_string();
        assert!(e.contains("`a.b`") && e.contains("the weights sum to 0"), "{e}");
        let e = recipe.validate(&[("x", 1.0)]).unwrap_err().to_string();
        assert!(e.contains("for `*` there are 2 weights, and 1 models"), "{e}");
        let e = recipe.check(&["c"]).unwrap_err().to_string();
        assert!(e.contains("fits the pattern `a.*`"), "{e}");
        let e = recipe.clone().method_for("d", Method::Fisher).validate(&models).unwrap_err().to_string();
        assert!(e.contains("`Fisher average` (for `d`), one needs curvature"), "{e}");
        assert!(recipe.needs_base() && Recipe::new(Method::linear()).method_for("a", Method::ModelStock).needs_base());
    }

    #[test]
    fn names_say_what_a_tensor_is_for() {
        let recipe = Recipe::new(Method::linear());
        for (name, role) in [
            ("bn.running_mean", Role::Statistic),
            ("running_var", Role::Statistic),
            ("bn.num_batches_tracked", Role::Kept),
            // Weights whose names are only like those.
            ("running_mean.weight", Role::Weight),
            ("bn.running_variance", Role::Weight),
            ("explora.weight", Role::Weight),
            ("lora_alpha", Role::Weight),
        ] {
            assert_eq!(recipe.role(name).unwrap(), role, "{name}");
        }
        for name in [
            "base_model.model.q_proj.lora_A.weight",
            "q_proj.lora_B.default.weight",
            "emb.lora_embedding_A.default",
            "lora_unet_down_blocks_0_to_q.lora_down.weight",
            "to_q_lora.up.weight",
            "x.hada_w1_a",
            "x.lokr_w2_b",
            "layers.0.lora_a",
        ] {
            let e = recipe.role(name).unwrap_err().to_string();
            assert!(e.contains(name) && e.contains("average of the products"), "{e}");
            assert_eq!(recipe.clone().exclude("*.*").role(name).unwrap(), Role::Kept);
            assert_eq!(recipe.clone().factors(true).role(name).unwrap(), Role::Weight);
        }
        let some = recipe.include("*.weight").exclude("head.*");
        for (name, role) in [("a.weight", Role::Weight), ("a.bias", Role::Kept), ("head.weight", Role::Kept)] {
            assert_eq!(some.role(name).unwrap(), role);
        }
        some.check(&["a.weight", "head.bias"]).unwrap();
        let e = some.check(&["a.weight"]).unwrap_err().to_string();
        assert!(e.contains("`head.*`"), "{e}");
    }
}
