//! Some of a model's parameters, chosen by what is usually meant: their names, or the last layer.

use super::{Leaf, Params};
use crate::{Error, Result};
use std::collections::HashSet;

/// The layer that a name belongs to: all before the last dot.
fn layer(name: &str) -> &str {
    name.rsplit_once('.').map_or("", |(layer, _)| layer)
}

impl Params {
    /// Those of these names. A posterior of them alone is that of weights whose others are known: its precision is the
    /// block S_AA of the whole, so that its variances are the conditional ones, smaller than the marginals.
    ///
    /// [`Params::only`] chooses by a predicate.
    ///
    /// # Errors
    /// No name, or one that no parameter has.
    pub fn only_named<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Result<Self> {
        let names: HashSet<String> = names.into_iter().map(Into::into).collect();
        if names.is_empty() {
            return Err(Error::Parameters(
                "a subset of none was asked for; name at least one parameter, as Params::names lists them".to_owned(),
            ));
        }
        if let Some(unknown) = names.iter().filter(|name| self.find(name).is_none()).min() {
            let known: Vec<&str> = self.names().take(20).collect();
            let problem = format!("there is none of this name; the first are {}", known.join(", "));
            return Err(Error::parameter(unknown, problem));
        }
        Ok(self.only(move |name| names.contains(name)))
    }

    /// Those of the layer that the last trainable parameter belongs to, the weight and bias of the head as a rule: the
    /// names that agree with its name up to the last dot. The order is that of creation, so name the head by
    /// [`Params::only_named`] where it was not created last.
    ///
    /// ```
    /// # use tch::{Device, nn};
    /// use tch_blr::Params;
    /// # fn main() -> tch_blr::Result<()> {
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let _net = ["body", "head"].map(|name| nn::linear(vs.root() / name, 4, 2, Default::default()));
    /// let head = Params::from(&vs).last_layer()?;
    /// assert_eq!(head.names().collect::<Vec<_>>(), ["head.bias", "head.weight"]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// No parameter that requires gradients.
    pub fn last_layer(self) -> Result<Self> {
        let Some(last) = self.leaves.iter().rfind(|leaf| leaf.trainable()).map(Leaf::name) else {
            return Err(Error::Parameters(format!(
                "none of the {} requires gradients, so there is no last layer to take",
                self.len()
            )));
        };
        let last = layer(last).to_owned();
        Ok(self.only(move |name| layer(name) == last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, nn::VarStore};

    fn names(params: &Params) -> Vec<&str> {
        params.names().collect()
    }

    #[test]
    fn a_subset_is_chosen_by_name_or_as_the_last_layer() {
        let mut vs = VarStore::new(Device::Cpu);
        for (folder, name) in [("a", "w"), ("a", "b"), ("head", "w"), ("head", "b")] {
            let _ = vs.root().sub(folder).zeros(name, &[2]);
        }
        let all = || Params::from(&vs);
        assert_eq!(names(&all().only_named(["head.b", "a.w"]).unwrap()), ["a.w", "head.b"]);
        assert_eq!(names(&all().last_layer().unwrap()), ["head.w", "head.b"]);
        assert_eq!(names(&all().only(|name| !name.starts_with("head")).last_layer().unwrap()), ["a.w", "a.b"]);
        let flat = VarStore::new(Device::Cpu);
        let _ = [flat.root().sub("body").zeros("w", &[1]), flat.root().zeros("w", &[1])];
        assert_eq!(names(&Params::from(&flat).last_layer().unwrap()), ["w"]);
        let e = all().only_named(["head.b", "haed.w"]).unwrap_err().to_string();
        assert!(e.contains("`haed.w`") && e.contains("a.w, a.b, head.w"), "{e}");
        let e = all().only_named(Vec::<String>::new()).unwrap_err().to_string();
        assert!(e.contains("subset of none"), "{e}");
        vs.freeze();
        let e = Params::from(&vs).last_layer().unwrap_err().to_string();
        assert!(e.contains("none of the 4 requires gradients"), "{e}");
    }
}
