//! Named tensors with a description in one safetensors file, replaced atomically.
//!
//! The files that this crate writes whole: checkpoints, posteriors, memories. What each of them holds is in its own
//! module.

use crate::{Error, Result};
use blr_merge::WeightFile;
use blr_merge::storage::{DESCRIPTION, Draft, Entry, FileWriter};
use safetensors::Dtype;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// Of the description. What `content` holds is known by the form.
const VERSION: u32 = 1;

/// The description: what the file is, and what its writer has to say besides the tensors.
#[derive(Serialize, Deserialize)]
struct Description<C> {
    form: String,
    version: u32,
    content: C,
}

/// The kinds that states and posteriors have.
fn dtype(kind: Kind) -> Option<Dtype> {
    match kind {
        Kind::Float => Some(Dtype::F32),
        Kind::Double => Some(Dtype::F64),
        _ => None,
    }
}

/// Writes tensors (f32, f64) and `content` as a file of this form. It takes the place of an old file only once it is
/// whole.
pub(crate) fn save(path: &Path, form: &str, tensors: &[(String, Tensor)], content: &impl Serialize) -> Result<()> {
    let error = |problem: &dyn std::fmt::Display| Error::file(path, format!("cannot be written: {problem}"));
    let entry = |(name, t): &(String, Tensor)| {
        let dtype = dtype(t.kind()).ok_or_else(|| {
            Error::parameter(name, format!("kind {:?} cannot be saved: expected f32 or f64", t.kind()))
        })?;
        Ok(Entry { name: name.clone(), dtype, shape: t.size().iter().map(|n| *n as usize).collect() })
    };
    let entries = tensors.iter().map(entry).collect::<Result<Vec<_>>>()?;
    let description = Description { form: form.to_owned(), version: VERSION, content };
    let description = serde_json::to_string(&description).map_err(|e| error(&e))?;
    let metadata = HashMap::from([(DESCRIPTION.to_owned(), description)]);
    let draft = Draft::of_file(path)?;
    let nobody_asks = &mut |_| ();
    let mut file = FileWriter::new(path, draft.output(), &metadata, entries, nobody_asks)?;
    for (name, t) in tensors {
        let t = t.detach().f_to_device(Device::Cpu)?.f_contiguous()?;
        let mut bytes = vec![0; t.numel() * t.kind().elt_size_in_bytes()];
        t.f_copy_data_u8(&mut bytes, t.numel())?;
        file.whole(name, &bytes)?;
    }
    Ok(draft.commit()?)
}

/// Reads what [`save`] wrote in this form: tensors on the CPU, and the content.
pub(crate) fn load<C: DeserializeOwned>(path: &Path, form: &str) -> Result<(BTreeMap<String, Tensor>, C)> {
    let error = |problem: &dyn std::fmt::Display| Error::file(path, problem);
    let file = WeightFile::open(path)?;
    // The description before the tensors: a file of another form should be named as one, whatever its tensors are.
    let description = file
        .metadata()
        .get(DESCRIPTION)
        .ok_or_else(|| error(&"holds tensors, but no description by tch-blr; it was written by something else"))?;
    let damaged = |e| error(&format!("has a description that cannot be read: {e}"));
    // The content stays unread until the form is known: that of another form would fail with a message about fields.
    let found: Description<serde_json::Value> = serde_json::from_str(description).map_err(damaged)?;
    if (found.form.as_str(), found.version) != (form, VERSION) {
        let Description { form: other, version, .. } = found;
        return Err(error(&format!("holds `{other}`, version {version}: expected `{form}`, version {VERSION}")));
    }
    let content = serde_json::from_value(found.content).map_err(damaged)?;
    let mut tensors = BTreeMap::new();
    for (name, t) in file.tensors() {
        let kind = match t.dtype {
            Dtype::F32 => Kind::Float,
            Dtype::F64 => Kind::Double,
            other => return Err(error(&format!("tensor `{name}` has kind {other:?}: expected F32 or F64"))),
        };
        let refused = |problem: String| error(&format!("tensor `{name}` cannot be made: {problem}"));
        // A shape without elements may have any other sizes, also such as are negative for libtorch.
        let size = t.shape.iter().map(|n| i64::try_from(*n)).collect::<std::result::Result<Vec<i64>, _>>();
        let size = size.map_err(|e| refused(e.to_string()))?;
        let mut bytes = vec![0; t.bytes() as usize];
        file.read_bytes(t, 0, &mut bytes)?;
        let tensor = Tensor::f_from_data_size(&bytes, &size, kind).map_err(|e| refused(Error::from(e).to_string()))?;
        tensors.insert(name.clone(), tensor);
    }
    Ok((tensors, content))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn example(x: f64) -> Vec<(String, Tensor)> {
        vec![
            ("a".to_owned(), Tensor::from_slice(&[x, 2.0]).reshape([2, 1])),
            ("empty".to_owned(), Tensor::zeros([0, 3], (Kind::Float, Device::Cpu))),
            ("scalar".to_owned(), Tensor::from(x as f32)),
        ]
    }

    #[test]
    fn what_is_saved_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        save(&path, "test", &example(1.5), &0.1f64).unwrap();
        save(&path, "test", &example(2.5), &0.300_000_000_000_000_04_f64).unwrap();
        let (tensors, description) = load::<f64>(&path, "test").unwrap();
        assert_eq!(description, 0.300_000_000_000_000_04);
        assert_eq!(tensors.keys().collect::<Vec<_>>(), ["a", "empty", "scalar"]);
        assert_eq!(tensors["a"], example(2.5)[0].1);
        assert_eq!((tensors["empty"].size(), tensors["scalar"].double_value(&[])), (vec![0, 3], 2.5));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "a draft was left behind");
    }

    #[test]
    fn another_form_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        save(&path, "adam optimizer", &example(1.5), &0.1f64).unwrap();
        let e = load::<f64>(&path, "ivon optimizer").unwrap_err().to_string();
        assert!(e.contains("holds `adam optimizer`, version 1: expected `ivon optimizer`"), "{e}");
    }

    /// A file cut off at any byte is refused, and so is one whose header lies.
    #[test]
    fn broken_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        save(&path, "test", &example(1.5), &0.1f64).unwrap();
        let whole = fs::read(&path).unwrap();
        for n in 0..whole.len() {
            fs::write(&path, &whole[..n]).unwrap();
            let e = load::<f64>(&path, "test").unwrap_err().to_string();
            assert!(e.contains("x.safetensors"), "{e}");
        }
        for header in [
            r#"{"__metadata__":{"tch_blr":"DESC"},"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}}"#,
            r#"{"__metadata__":{"tch_blr":"DESC"},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#,
            r#"{"__metadata__":{"tch_blr":"DESC"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#,
            r#"{"__metadata__":{"tch_blr":"DESC"},"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#,
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
            r#"{"__metadata__":{"tch_blr":"{}"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
        ] {
            let header = header.replace("DESC", r#"{\"form\":\"test\",\"version\":1,\"content\":1}"#);
            let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
            bytes.extend(header.as_bytes());
            bytes.extend([0; 8]);
            if header.contains("[0,4]") {
                bytes.truncate(bytes.len() - 4);
            }
            fs::write(&path, &bytes).unwrap();
            load::<f64>(&path, "test").unwrap_err();
        }
        fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
        load::<f64>(&path, "test").unwrap_err();
    }

    #[test]
    fn a_failed_save_leaves_the_old_file_and_no_draft() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        save(&path, "test", &example(1.5), &0.1f64).unwrap();
        let before = fs::read(&path).unwrap();
        let integers = [("i".to_owned(), Tensor::from_slice(&[1i64]))];
        assert!(save(&path, "test", &integers, &0.1f64).unwrap_err().to_string().contains("`i`"));
        assert!(save(&dir.path().join("no/folder"), "test", &example(1.0), &0.1f64).is_err());
        assert!(save(dir.path(), "test", &example(1.0), &0.1f64).is_err());
        assert_eq!((fs::read(&path).unwrap(), fs::read_dir(dir.path()).unwrap().count()), (before, 1));
    }
}
