//! All that an optimizer may change, to be compared before and after.

use crate::compare::bits;
use tch::nn::VarStore;
use tch_blr::Optimizer;
use tch_blr::rule::Row;

/// All that an optimizer may change, bit by bit: its checkpoint (weights, state, accumulated gradients, counts, noise),
/// the weights themselves and where they lie.
#[derive(PartialEq)]
pub struct Snapshot {
    pub file: Vec<u8>,
    pub weights: Vec<Vec<u8>>,
    addresses: Vec<usize>,
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let header = u64::from_le_bytes(self.file[..8].try_into().unwrap()) as usize;
        let sum = |bytes: &[u8]| bytes.iter().fold(0u64, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(*b)));
        let weights: Vec<u64> = self.weights.iter().map(|w| sum(w)).collect();
        let header = String::from_utf8_lossy(&self.file[8..8 + header]);
        write!(f, "{header}\ntensors {:x}, weights {weights:x?}, at {:x?}", sum(&self.file), self.addresses)
    }
}

impl Snapshot {
    pub fn of<R: Row>(opt: &Optimizer<R>, vs: &VarStore) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("snapshot");
        opt.save(&path).unwrap();
        let variables = vs.trainable_variables();
        Snapshot {
            file: std::fs::read(path).unwrap(),
            weights: variables.iter().map(bits).collect(),
            addresses: variables.iter().map(|w| w.data_ptr() as usize).collect(),
        }
    }

    /// What can be compared between two models.
    pub fn values(self) -> (Vec<u8>, Vec<Vec<u8>>) {
        (self.file, self.weights)
    }
}
