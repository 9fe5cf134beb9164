//! The host's side of passes, over the CPU as a device.

use super::super::super::{Draw, Elementwise, Field, Job, Real};
use super::super::emulated::Emulated;
use super::super::emulation;
use super::super::{CHUNK, table};
use super::*;
use crate::Error;
use std::cell::RefCell;
use std::rc::Rc;
use tch::Device as At;

/// Every operation, with two results.
struct Everything;

impl Elementwise for Everything {
    const OUTPUTS: usize = 2;
    fn constants(&self) -> super::super::super::Constants {
        let mut k = [0.0; 16];
        k[1] = 0.3;
        k
    }
    #[inline(always)]
    fn eval<T: Real>(&self, constant: impl Fn(usize) -> T, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
        let (x, y, c, z) = (read(0), read(1), read(2), read(3));
        write(0, (x + z / (y.abs() + c).sqrt()) * T::real(1.1));
        write(1, (x * constant(1) - y).min(c).max(-z) + y.tanh());
    }
}

#[test]
fn prints() {
    for kind in [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half] {
        emulation::compare(|| {
            for n in [0, 1, 63, 64, 65, 4097, 70_000, 140_000] {
                let [x, y] = [1.0, -2.0].map(|a| Tensor::linspace(a, 3.0, n, (kind, At::Cpu)));
                let wide = Tensor::zeros([n], (if kind == Kind::Double { kind } else { Kind::Float }, At::Cpu));
                let at = Draw { step: 7 << 33 | 3, sample: 9, parameter: 0, group: (1 << 28) - 1 };
                let inputs = [Field::Tensor(&x), Field::Tensor(&y), Field::Number(0.7), Field::Noise { seed: 3 << 40, at }];
                let mut job = Job::new(Everything, inputs, [Some(&x), Some(&y)]);
                job.also.push((1, &wide));
                super::super::super::run([job]).unwrap();
                super::super::super::sum_of_squares([&x, &y, &wide]);
            }
        });
    }
    assert_eq!(emulation::compared(), (4, 32));
    for (i, s) in emulation::sources().iter().enumerate() { std::fs::write(format!("/tmp/cuda_src/{i}.cu"), s).unwrap(); }
}
