//! What can go wrong before the first step, and the one thing that stops a step.

/// Why a plan cannot be executed, or its memory not be had.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The system refused the address space.
    #[error(
        "cannot reserve an arena of {bytes} bytes: {source}\n\
         hint: a limit on address space (`ulimit -v`) must be above the memory budget"
    )]
    Reserve {
        /// Bytes asked for.
        bytes: u64,
        /// What the system said.
        source: std::io::Error,
    },
    /// The plan's scratch is sized for another number of threads.
    #[error(
        "the plan is made for {plan} threads, the pool has {pool}\n\
         hint: plan again with the machine that will run the plan"
    )]
    Threads {
        /// Threads that the plan's scratch is sized for.
        plan: u32,
        /// Threads of the pool.
        pool: usize,
    },
    /// The token axis is too long for the executor's tables.
    #[error(
        "a step of {n_tokens} tokens is too long, at most {} fit\n\
         hint: lower the number of rows per step",
        u32::MAX
    )]
    TooManyTokens {
        /// Tokens on the axis.
        n_tokens: u64,
    },
    /// An instruction's operands are not what its op needs.
    #[error(
        "instruction {instr} ({op}): {what}\n\
         hint: this is a mistake in the plan, which the checker would name in full"
    )]
    Operand {
        /// Index of the instruction.
        instr: usize,
        /// The op's name.
        op: &'static str,
        /// Which operand, what it is and what it should be.
        what: String,
    },
    /// A buffer does not lie where buffers may lie.
    #[error(
        "buffer {buffer}: {what}\n\
         hint: this is a mistake in the plan, which the checker would name in full"
    )]
    Buffer {
        /// Index of the buffer.
        buffer: u32,
        /// What is wrong with it.
        what: String,
    },
    /// A transfer between tiers, which this executor does not have.
    #[error(
        "instruction {instr} moves data between tiers, this executor has the host tier only\n\
         hint: plan without paging"
    )]
    Transfer {
        /// Index of the instruction.
        instr: usize,
    },
}

/// Why a step stopped before its first update: a number that is infinite or none at all.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum NonFinite {
    /// The sum of the step's losses, in token order.
    #[error("the sum of the losses is {0}\nhint: lower the learning rate")]
    Loss(f64),
    /// The norm of the whole gradient, in graphs that clip.
    #[error("the norm of the gradient is {0}\nhint: lower the learning rate")]
    GradNorm(f64),
}
