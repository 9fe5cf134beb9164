//! A program outside tch-blr's own package that links libtorch and runs without `LD_LIBRARY_PATH`.

use tch::Tensor;

fn main() -> Result<(), tch_blr::Error> {
    let x = Tensor::from_slice(&[1.0, 2.0, 3.0]);
    println!("sum = {}", x.sum(x.kind()).double_value(&[]));
    // libtorch refuses this one, and `?` would make it a `tch_blr::Error`.
    let refused = tch_blr::Error::from(x.f_reshape([2, 2]).unwrap_err());
    println!("error = {refused}");
    Ok(())
}
