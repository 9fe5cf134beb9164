//! To which tensors a method is applied: what their names say that they are for, and what the user says.

use crate::{Error, Method, Result};

/// A [`Method`], and to which tensors it is applied. A method alone converts into the recipe without further wishes.
///
/// | tensor | result |
/// |---|---|
/// | `running_mean`, `running_var` | the average, by the weights that are positive, whatever the method |
/// | `num_batches_tracked`, integers, booleans | the base's, or the first model's |
/// | factors of LoRA and its like (`lora_A`, `lora_B`, …) | refused, unless [`Recipe::factors`] |
/// | left out ([`Recipe::include`], [`Recipe::exclude`]) | the base's, or the first model's |
/// | everything else | by the method |
///
/// The first two are the buffers of batch normalization: data, not weights. A sum of differences can make a variance
/// negative. Even their average is not the statistics of the merged network: where there are data, run them through it
/// once in training mode.
///
/// The product of two averages is not the average of two products: merged factor by factor, two adapters that both
/// work may give one that does neither's task. Multiply the factors first, and merge the products.
///
/// ```
/// use blr_merge::{Method, Recipe};
/// let recipe = Recipe::new(Method::task_arithmetic(0.5)).exclude("*.bias").exclude("lm_head.*");
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    pub(crate) method: Method,
    include: Vec<String>,
    exclude: Vec<String>,
    factors: bool,
    pub(crate) tied: Vec<(String, String)>,
}

impl From<Method> for Recipe {
    fn from(method: Method) -> Self {
        Recipe { method, include: Vec::new(), exclude: Vec::new(), factors: false, tied: Vec::new() }
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

    /// Only tensors whose whole name fits this pattern, or another one that is given so; `*` stands for any characters
    /// and `?` for one. The others are copied and may differ between the models. Default: all.
    #[must_use]
    pub fn include(mut self, pattern: impl Into<String>) -> Self {
        self.include.push(pattern.into());
        self
    }

    /// Without the tensors whose whole name fits this pattern (as [`Recipe::include`], over which it prevails): they
    /// are copied, and may differ between the models.
    #[must_use]
    pub fn exclude(mut self, pattern: impl Into<String>) -> Self {
        self.exclude.push(pattern.into());
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

    /// What becomes of the tensor of this name.
    ///
    /// # Errors
    /// [`Error::Parameter`] for the factor of an adapter, unless these are left out or wanted.
    pub fn role(&self, name: &str) -> Result<Role> {
        let included = self.include.is_empty() || self.include.iter().any(|pattern| fits(pattern, name));
        if !included || self.exclude.iter().any(|pattern| fits(pattern, name)) {
            return Ok(Role::Kept);
        }
        match name.rsplit('.').next() {
            Some("running_mean" | "running_var") => Ok(Role::Statistic),
            Some("num_batches_tracked") => Ok(Role::Kept),
            _ if is_factor(name) && !self.factors => Err(Error::parameter(
                name,
                "it is a factor of a low-rank adapter, and the product of averages is not the average of the products: \
                 multiply the factors and merge the products, leave it out (exclude), or ask for it (factors)",
            )),
            _ => Ok(Role::Weight),
        }
    }

    /// Checks that every pattern fits some name: one that fits none is misspelt.
    ///
    /// # Errors
    /// [`Error::Merge`] with the first pattern that fits none.
    pub fn check(&self, names: &[&str]) -> Result<()> {
        let unused = |pattern: &&String| !names.iter().any(|name| fits(pattern, name));
        match self.include.iter().chain(&self.exclude).find(unused) {
            Some(pattern) => Err(Error::Merge(format!(
                "no tensor's name fits the pattern `{pattern}`: it must fit all of a name, with * for any characters"
            ))),
            None => Ok(()),
        }
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

/// Whether a whole name fits a pattern.
fn fits(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    // Where the last star is, and the end of what it has taken so far: if the rest does not fit, it takes one more.
    // Earlier stars need not be tried again, for whatever they could take, the last one can as well.
    let mut star = None;
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(c) if *c == '?' || *c == name[n] => (p, n) = (p + 1, n + 1),
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    (p, n) = (at + 1, taken + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
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
            ("**b*", "b", true),
            ("a*a", "a", false),
            ("[a]", "a", false),
        ] {
            assert_eq!(fits(pattern, name), expected, "{pattern} {name}");
        }
        // Not exponential in the number of stars.
        assert!(!fits(&"*a".repeat(1000), &"a".repeat(999)));
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
