//! Every defect that a plan can have, one variant each.

use ounce_ir::OpId;
use ounce_program::{BufferId, BufferRef, BufferRole, Tier};

const HINT: &str = "\nhint: the plan is wrong and was not run; please report the model, the budget \
                    and this message";

/// Where in the plan: an instruction and what it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct At {
    /// Index of the instruction.
    pub instr: usize,
    /// The op's name, or `zero`, `copy`, `wait`.
    pub what: &'static str,
}

impl std::fmt::Display for At {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "instruction {} ({})", self.instr, self.what)
    }
}

/// What is wrong with a plan. Fields are what the messages say they are; sizes are in bytes.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[expect(missing_docs, reason = "the message of each variant says what its fields are")]
pub enum CheckError {
    // The packing of bytes.
    #[error("buffer {buffer} has the role {role:?}, which the graph does not know{}", HINT)]
    UnknownRole { buffer: BufferId, role: BufferRole },
    #[error(
        "buffer {buffer} ({role:?}) has {bytes} bytes at byte {offset}; both must be multiples of \
         64{}",
        HINT
    )]
    BufferMisaligned { buffer: BufferId, role: BufferRole, offset: u64, bytes: u64 },
    #[error(
        "buffer {buffer} ({role:?}) has {bytes} bytes at byte {offset}, which is outside its arena \
         of {arena_bytes} bytes{}",
        HINT
    )]
    BufferOutsideArena {
        buffer: BufferId,
        role: BufferRole,
        offset: u64,
        bytes: u64,
        arena_bytes: u64,
    },
    #[error(
        "buffer {buffer} ({role:?}) lives {start}..{end}, which is not part of the plan's \
         {n_instrs} instructions{}",
        HINT
    )]
    BufferLifetime { buffer: BufferId, role: BufferRole, start: u32, end: u32, n_instrs: usize },
    #[error(
        "buffers {a} ({a_role:?}) and {b} ({b_role:?}) are both live at instruction {instr} and \
         share bytes{}",
        HINT
    )]
    BuffersOverlap { a: BufferId, a_role: BufferRole, b: BufferId, b_role: BufferRole, instr: u32 },
    #[error("the plan has no buffer for {role:?}{}", HINT)]
    ResidentMissing { role: BufferRole },
    #[error("buffers {first} and {second} are both for {role:?}{}", HINT)]
    ResidentTwice { role: BufferRole, first: BufferId, second: BufferId },
    #[error(
        "buffer {buffer} ({role:?}) lives {start}..{end}, but must live through all {n_instrs} \
         instructions{}",
        HINT
    )]
    ResidentLifetime { buffer: BufferId, role: BufferRole, start: u32, end: u32, n_instrs: usize },
    #[error("buffer {buffer} ({role:?}) is on tier {tier:?}, but must be in host memory{}", HINT)]
    ResidentTier { buffer: BufferId, role: BufferRole, tier: Tier },
    #[error("buffer {buffer} ({role:?}) has {bytes} bytes, but needs {need_bytes}{}", HINT)]
    ResidentTooSmall { buffer: BufferId, role: BufferRole, bytes: u64, need_bytes: u64 },

    #[error("the graph itself is wrong: {0}")]
    Graph(ounce_ir::VerifyError),

    // The certificate.
    #[error(
        "the plan is for {plan_threads} threads, but the machine has {machine_threads}{}",
        HINT
    )]
    Threads { plan_threads: u32, machine_threads: u32 },
    #[error(
        "the plan counts {plan_bytes} bytes outside the arena, but the machine declares \
         {machine_bytes}{}",
        HINT
    )]
    Baseline { plan_bytes: u64, machine_bytes: u64 },
    #[error(
        "the certificate's peak is {certified_bytes} bytes, but arena and baseline are \
         {peak_bytes} bytes{}",
        HINT
    )]
    Peak { certified_bytes: u64, peak_bytes: u64 },
    #[error(
        "the certificate's largest load is {certified_bytes} bytes, but live buffers and baseline \
         reach {max_load_bytes} bytes{}",
        HINT
    )]
    MaxLoad { certified_bytes: u64, max_load_bytes: u64 },
    #[error("the peak of {peak_bytes} bytes exceeds the budget of {budget_bytes} bytes{}", HINT)]
    OverBudget { peak_bytes: u64, budget_bytes: u64 },
    #[error(
        "the certificate's lower bound of {bound_s} s per step is above its prediction of {step_s} \
         s{}",
        HINT
    )]
    TimeBound { step_s: f64, bound_s: f64 },

    // References into buffers.
    #[error("{at} names {reference}, but there is no such buffer{}", HINT)]
    UnknownBuffer { at: At, reference: BufferRef },
    #[error("{at} names {reference}, but the buffer has {buffer_bytes} bytes{}", HINT)]
    OutsideBuffer { at: At, reference: BufferRef, buffer_bytes: u64 },
    #[error("{at} names {reference}, but the buffer lives {start}..{end}{}", HINT)]
    NotLive { at: At, reference: BufferRef, start: u32, end: u32 },
    #[error("{at} names {reference}, which does not start at a multiple of 64{}", HINT)]
    Misaligned { at: At, reference: BufferRef },
    #[error("{at} names {reference} on tier {tier:?}, where it cannot compute{}", HINT)]
    WrongTier { at: At, reference: BufferRef, tier: Tier },

    // Runs.
    #[error("{at} runs {op}, but the graph has no such op{}", HINT)]
    UnknownOp { at: At, op: OpId },
    #[error("{at} covers tokens {start}..{end} of an axis of {n_tokens} tokens{}", HINT)]
    Tokens { at: At, start: u64, end: u64, n_tokens: u64 },
    #[error("{at} covers tokens {start}..{end}; cuts must fall on multiples of 64{}", HINT)]
    CutInGranule { at: At, start: u64, end: u64 },
    #[error(
        "{at} covers tokens {start}..{end}, but mixes the tokens of a row: cuts must fall on \
         multiples of {row_stride}{}",
        HINT
    )]
    CutInRow { at: At, start: u64, end: u64, row_stride: u64 },
    #[error("{at} covers tokens {start}..{end}, but must run on all {n_tokens} at once{}", HINT)]
    NotAllTokens { at: At, start: u64, end: u64, n_tokens: u64 },
    #[error("{at} has {found} operands, but needs {wanted}{}", HINT)]
    OperandCount { at: At, found: usize, wanted: usize },
    #[error("{at}: operand {operand} ({name}) has {found} bytes, but needs {wanted}{}", HINT)]
    OperandBytes { at: At, operand: usize, name: String, found: u64, wanted: u64 },
    #[error("{at} writes operand {written}, which shares bytes with operand {other}{}", HINT)]
    OperandsOverlap { at: At, written: usize, other: usize },
    #[error("{at} reads {wanted} at byte {address}, but finds {found}{}", HINT)]
    Misread { at: At, wanted: String, address: u64, found: String },
    #[error("{at} runs again on tokens {start}..{end}, but must run once per step{}", HINT)]
    RunsTwice { at: At, start: u64, end: u64 },
    #[error("{op} ({name}) ran on {done_tokens} of {n_tokens} tokens{}", HINT)]
    NotRun { op: OpId, name: &'static str, done_tokens: u64, n_tokens: u64 },
    #[error("after the step, byte {address} must hold {wanted}, but holds {found}{}", HINT)]
    NotWritten { wanted: String, address: u64, found: String },

    // Gradient sums.
    #[error("{at} names {value}, which is not a gradient sum that starts at zero{}", HINT)]
    NotASum { at: At, value: String },
    #[error("{at}: {sum} was set to zero before{}", HINT)]
    ZeroedTwice { at: At, sum: String },
    #[error("{at} adds tokens from {start} to {sum}, but its next token is {next}{}", HINT)]
    SumOrder { at: At, sum: String, start: u64, next: u64 },
    #[error("{at} needs {sum} with all of {op} ({name}), which did {done_tokens} tokens{}", HINT)]
    SumIncomplete { at: At, sum: String, op: OpId, name: &'static str, done_tokens: u64 },
    #[error("{at} needs {sum} after the update of its parameter{}", HINT)]
    SumAfterUpdate { at: At, sum: String },

    // Transfers.
    #[error("{at} copies {src_bytes} bytes to {dst_bytes} bytes{}", HINT)]
    CopyBytes { at: At, src_bytes: u64, dst_bytes: u64 },
    #[error("{at} copies bytes onto themselves{}", HINT)]
    CopyOverlap { at: At },
    #[error("{at} reads or writes byte {address} while transfer {tag} is under way there{}", HINT)]
    InFlight { at: At, address: u64, tag: u32 },
    #[error("{at} starts transfer {tag}, which is under way{}", HINT)]
    TagInUse { at: At, tag: u32 },
    #[error("{at} waits for transfer {tag}, which is not under way{}", HINT)]
    UnknownTag { at: At, tag: u32 },
    #[error("nothing waits for transfer {tag}{}", HINT)]
    NeverWaited { tag: u32 },
}
