//! The trait over MPI, on 1 to 4 ranks: numbers, bits, and what happens when a rank does not do as the others.

mod job;

use job::Job;

#[test]
fn sums_have_the_same_bits_on_every_rank() {
    for ranks in 1..=4 {
        Job::of(ranks, "sums", &[]).passes(ranks);
    }
}

/// Those of Open MPI: linear, reduction and broadcast, recursive doubling, ring, ring in segments, halves.
#[test]
fn sums_have_the_same_bits_by_every_algorithm() {
    for algorithm in 1..=6 {
        let variables = [
            ("OMPI_MCA_coll_tuned_use_dynamic_rules", "1"),
            ("OMPI_MCA_coll_tuned_allreduce_algorithm", &algorithm.to_string()),
            ("OMPI_MCA_coll", "basic,libnbc,self,inter,tuned"),
        ];
        Job::of(3, "sums", &variables).passes(3);
    }
}

#[test]
fn broadcasts_from_every_rank() {
    for ranks in [1, 2, 4] {
        Job::of(ranks, "broadcasts", &[]).passes(ranks);
    }
}

#[test]
fn is_started_once() {
    Job::of(2, "once", &[]).passes(2);
}

#[test]
fn ranks_that_do_not_agree_have_the_same_error() {
    for ranks in [2, 4] {
        for case in ["lengths", "calls", "roots"] {
            Job::of(ranks, "disagree", &[("CASE", case)]).passes(ranks);
        }
    }
}

#[test]
fn those_who_leave_do_not_keep_the_others_waiting() {
    for ranks in [2, 4] {
        Job::of(ranks, "leave", &[]).passes(ranks);
    }
}

#[test]
fn an_error_of_one_rank_ends_the_job() {
    Job::of(3, "returns_an_error", &[]).fails(None, &["rank 1 has left while others go on", "of its own"]);
}

#[test]
fn a_panic_of_one_rank_ends_the_job() {
    Job::of(4, "panics", &[]).fails(Some(101), &["of its own", "rank 1 of 4 has panicked: the job ends"]);
}

#[test]
fn a_process_that_goes_ends_the_job() {
    Job::of(3, "exits", &[]).fails(None, &["exit"]);
    Job::of(3, "is_killed", &[]).fails(Some(128 + 9), &["signal 9"]);
}

/// What each rank does: run by the tests above, under `mpirun`.
mod child {
    use tch_blr::parallel::Collective;
    use tch_blr_mpi::Mpi;

    const PIECE: usize = 1 << 18;

    /// Numbers of a rank, of all magnitudes.
    fn number(rank: usize, i: usize) -> f64 {
        let mut x = (rank as u64 + 1) << 40 | i as u64;
        for _ in 0..3 {
            x = (x ^ (x >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        let sign = if x & 1 == 0 { 1.0 } else { -1.0 };
        let size = (x >> 32) as f64 / 2_f64.powi(32);
        sign * (1.0 + size) * 10_f64.powi((x >> 8) as i32 % 13 - 6)
    }

    #[test]
    #[ignore = "run by mpirun"]
    fn sums() {
        let mpi = Mpi::new().unwrap();
        let (rank, size) = (mpi.rank(), mpi.size());
        assert!(rank < size);
        // Around the lengths at which Open MPI takes another algorithm, in bytes: 1, 4, 10 kB, 1 MB; and our pieces.
        let lengths = [0, 1, 2, 3, 5, 64, 255, 257, 1023, 1025, 2499, 2500, 2501, 2559, 2560, 2561, 4096, 50_000];
        for n in lengths.into_iter().chain([PIECE - 1, PIECE, PIECE + 1, 4 * PIECE + 3]) {
            let mut x: Vec<f32> = (0..n).map(|i| number(rank, i) as f32).collect();
            mpi.sum_f32(&mut x).unwrap();
            let mut bytes: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
            let mine = bytes.clone();
            mpi.broadcast(0, &mut bytes).unwrap();
            assert!(bytes == mine, "{n} numbers: the bits of rank {rank} are not those of rank 0");
            for (i, x) in x.iter().enumerate().step_by(1 + n / 5000) {
                let terms: Vec<f64> = (0..size).map(|rank| f64::from(number(rank, i) as f32)).collect();
                let sum: f64 = terms.iter().sum();
                let bound = terms.iter().map(|x| x.abs()).sum::<f64>() * f64::from(f32::EPSILON) * size as f64;
                assert!((f64::from(*x) - sum).abs() <= bound, "{n}, {i}: {x} and not {sum}");
            }
            // Whole numbers: exact in any order.
            let mut x: Vec<f64> = (0..n).map(|i| (i + 7 * rank) as f64).collect();
            mpi.sum_f64(&mut x).unwrap();
            let expected = |i: usize| (i * size + 7 * size * (size - 1) / 2) as f64;
            assert!(x.iter().enumerate().all(|(i, x)| *x == expected(i)), "{n}");
        }
        for x in [f32::NAN, f32::INFINITY] {
            let mut y = [if rank == 0 { x } else { 1.0 }, 1.0];
            mpi.sum_f32(&mut y).unwrap();
            assert!(!y[0].is_finite() && y[1] == size as f32);
        }
    }

    #[test]
    #[ignore = "run by mpirun"]
    fn broadcasts() {
        let mpi = Mpi::new().unwrap();
        for root in 0..mpi.size() {
            for n in [0, 1, 5, 4097, PIECE - 1, PIECE, 2 * PIECE + 1] {
                let byte = |rank: usize, i: usize| (rank + 31 * i + i / PIECE) as u8;
                let mut x: Vec<u8> = (0..n).map(|i| byte(mpi.rank(), i)).collect();
                mpi.broadcast(root, &mut x).unwrap();
                assert!(x.iter().enumerate().all(|(i, x)| *x == byte(root, i)), "root {root}, {n} bytes");
                mpi.barrier().unwrap();
            }
        }
        // Not a call: nobody has come for it, and the group goes on.
        let e = mpi.broadcast(mpi.size(), &mut [0; 5]).unwrap_err().to_string();
        assert!(e.contains("root") && e.contains(&mpi.size().to_string()), "{e}");
        mpi.barrier().unwrap();
    }

    #[test]
    #[ignore = "run by mpirun"]
    fn once() {
        let mpi = Mpi::new().unwrap();
        let again = || Mpi::new().unwrap_err();
        assert!(matches!(again(), tch_blr::Error::Collective(e) if e.contains("started before")));
        let other = mpi.clone();
        // Another thread, as an optimizer may be moved to one.
        let sum = std::thread::spawn(move || {
            let mut x = [other.rank() as f32];
            other.sum_f32(&mut x).map(|()| x[0])
        });
        assert_eq!(sum.join().unwrap().unwrap(), (0..mpi.size()).sum::<usize>() as f32);
        drop(mpi);
        again();
    }

    #[test]
    #[ignore = "run by mpirun"]
    fn disagree() {
        let mpi = Mpi::new().unwrap();
        let other = mpi.rank() == mpi.size() - 1;
        let call = || match (std::env::var("CASE").unwrap().as_str(), other) {
            ("lengths", other) => mpi.sum_f32(&mut [1.0, 2.0, 3.0][usize::from(other)..]),
            ("calls", false) => mpi.sum_f32(&mut [1.0; 3]),
            ("calls", true) => mpi.sum_f64(&mut [1.0; 3]),
            (_, other) => mpi.broadcast(usize::from(other), &mut [1; 3]),
        };
        mpi.barrier().unwrap();
        let e = call().unwrap_err().to_string();
        let expected = [
            "ranks: one brings 2 numbers to a sum of f32, and another brings 3",
            "ranks: one has come for a sum of f32, and another for a sum of f64",
            "ranks: one has come for a broadcast of rank 0, and another for a broadcast of rank 1",
        ];
        assert!(expected.contains(&e.as_str()), "{e}");
        // From then on there are errors, and nobody waits.
        assert_eq!(mpi.barrier().unwrap_err().to_string(), e);
    }

    #[test]
    #[ignore = "run by mpirun"]
    fn leave() {
        let mpi = Mpi::new().unwrap();
        mpi.barrier().unwrap();
        if mpi.rank() == 1 {
            return;
        }
        for _ in 0..2 {
            let e = mpi.sum_f32(&mut [1.0]).unwrap_err().to_string();
            assert_eq!(e, "ranks: rank 1 has left while others go on");
        }
    }

    #[test]
    #[ignore = "run by mpirun"]
    fn returns_an_error() -> Result<(), Box<dyn std::error::Error>> {
        let mpi = Mpi::new()?;
        for step in 0..3 {
            if mpi.rank() == 1 && step == 2 {
                return Err("an error of its own".into());
            }
            mpi.barrier()?;
        }
        Ok(())
    }

    #[test]
    #[ignore = "run by mpirun"]
    fn panics() {
        let mpi = Mpi::new().unwrap();
        for step in 0.. {
            assert!(mpi.rank() != 1 || step < 2, "a panic of its own");
            mpi.barrier().unwrap();
        }
    }

    #[test]
    #[ignore = "run by mpirun"]
    fn exits() {
        let mpi = Mpi::new().unwrap();
        mpi.barrier().unwrap();
        if mpi.rank() == 1 {
            std::process::exit(0);
        }
        mpi.barrier().unwrap();
    }

    #[test]
    #[ignore = "run by mpirun"]
    fn is_killed() {
        let mpi = Mpi::new().unwrap();
        mpi.barrier().unwrap();
        if mpi.rank() == 1 {
            let own = std::process::id().to_string();
            std::process::Command::new("kill").args(["-KILL", &own]).status().unwrap();
        }
        mpi.barrier().unwrap();
    }
}
