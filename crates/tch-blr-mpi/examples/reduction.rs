//! x
fn main() {
    use std::time::Instant;
    use tch_blr::parallel::Collective;
    let mpi = tch_blr_mpi::Mpi::new().unwrap();
    for n in [1usize, 100, 10_000, 100_000, 1_000_000, 12_000_000] {
        let mut x = vec![1f32; n];
        let mut t = vec![];
        for _ in 0..(if n < 100_000 { 500 } else { 15 }) {
            mpi.barrier().unwrap();
            let b = Instant::now();
            mpi.sum_f32(&mut x).unwrap();
            t.push(b.elapsed().as_secs_f64());
            x.fill(1.0);
        }
        t.sort_by(f64::total_cmp);
        if mpi.rank() == 0 {
            println!("{} {n:>10} median {:>10.1} us min {:>10.1}", mpi.size(), t[t.len() / 2] * 1e6, t[0] * 1e6);
        }
    }
}
