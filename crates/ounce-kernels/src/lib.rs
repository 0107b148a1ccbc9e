//! Kernels: slices in, slices out; they allocate nothing and know no graph.
//!
//! Everything a transformer training step computes in f32 on a CPU is here, as free functions over
//! slices, plus the thread pool they run on.
//! Scratch memory comes from the caller, who asks a pure `*_scratch_elems` function for its size.
//! Results do not depend on the number of threads, on blocking, on how the token axis is cut into
//! calls, or on the instruction set that was chosen at run time, but for products in bf16, which AVX-512 BF16
//! adds in another order ([`tier`]).
//!
//! ```
//! use ounce_kernels::{gemm, pool::Pool, view::FloatType};
//! let pool = Pool::new(2);
//! let (x, w) = (vec![1.0; 3 * 4], vec![2.0; 5 * 4]);
//! let mut y = vec![0.0; 3 * 5];
//! let mut scratch = vec![0.0; gemm::gemm_scratch_elems(3, 5, 4, FloatType::F32, pool.n_threads())];
//! gemm::gemm(
//!     &pool,
//!     gemm::MatMut::new(&mut y, 3, 5),
//!     gemm::MatRef::new(&x, 3, 4),
//!     gemm::MatRef::new(&w, 5, 4).t(),
//!     gemm::Start::Zero,
//!     None,
//!     &mut scratch,
//! );
//! assert!(y.iter().all(|&v| v == 8.0));
//! ```
//!
//! Files, in reading order: [`pool`] (threads, disjoint writes), [`tier`] (instruction sets),
//! [`convert`] (bf16 and f16 to f32 and back), [`view`] (operands of any of these types),
//! [`master`] (exact weights in two halves), [`inout`] (in-place calls), [`math`] (exp and
//! friends), [`gemm`] (products), [`norm`], [`activation`], [`elementwise`], [`philox`] (random
//! bits), [`rope`], [`attention`], [`head`] (linear and cross entropy without all logits),
//! [`embed`], [`optim`], [`peak`] (what no kernel can exceed).

pub mod pool;
#[macro_use]
pub mod tier;
pub mod convert;
pub mod inout;
pub mod master;
pub mod math;
pub mod view;

pub mod gemm;

pub mod activation;
pub mod attention;
pub mod elementwise;
pub mod embed;
pub mod head;
pub mod norm;
pub mod optim;
pub mod peak;
pub mod philox;
pub mod rope;

#[cfg(test)]
mod sixteen_bits;
#[cfg(test)]
mod testing;
