//! What a pass may refuse.

use ounce_ir::{InferError, OpId};

/// A graph that a pass cannot rewrite.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PassError {
    /// The graph does not compute a loss.
    #[error(
        "differentiate: the graph has no cross_entropy op\nhint: end the last stage with \
         GraphBuilder::cross_entropy"
    )]
    NoLoss,
    /// Ops follow the loss.
    #[error(
        "differentiate: {loss} computes the loss, but {next} ({next_name}) follows it\nhint: \
         cross_entropy is the last op of a graph that is trained, and there is one"
    )]
    LossNotLast {
        /// The loss.
        loss: OpId,
        /// The op after it.
        next: OpId,
        /// Its name.
        next_name: &'static str,
    },
    /// The graph has backward or update ops.
    #[error(
        "differentiate: {op} ({op_name}) is not a forward op\nhint: differentiate a graph as the \
         builder made it, once"
    )]
    NotForward {
        /// The op.
        op: OpId,
        /// Its name.
        op_name: &'static str,
    },
    /// An op on the way from a trained parameter to the loss has no gradient rule.
    #[error(
        "differentiate: no gradient through {op_name}, which made value {value}\nhint: selecting \
         rows is for decoding; a graph that is trained keeps all tokens"
    )]
    NoRule {
        /// The op's name.
        op_name: &'static str,
        /// The value it made.
        value: String,
    },
    /// A gradient arrives at an output that only the backward may read.
    #[error(
        "differentiate: value {value} is read by an op that needs its gradient\nhint: only the \
         first output of an op may be used by other forward ops"
    )]
    SecondOutput {
        /// The output.
        value: String,
    },
    /// A parameter has more than one use whose gradient has the parameter's shape.
    #[error(
        "differentiate: parameter {param} is read by more than one op besides embeddings\nhint: \
         give every layer its own parameter; a head may share an embedding's"
    )]
    SharedParameter {
        /// The parameter.
        param: String,
    },
    /// A norm's weight is trained and its bias is not, or the other way round.
    #[error(
        "differentiate: of {weight} and {bias}, one is trained and one is frozen\nhint: train or \
         freeze the weight and the bias of a norm together"
    )]
    HalfFrozen {
        /// The weight.
        weight: String,
        /// The bias.
        bias: String,
    },
    /// The graph has no backward.
    #[error(
        "attach_optimizer: the graph has no gradient sums\nhint: differentiate it first, with at \
         least one trained parameter"
    )]
    NoGradients,
    /// A trained parameter does not influence the loss.
    #[error(
        "attach_optimizer: parameter {param} is trained, but the loss does not depend on \
         it\nhint: use it on the way to the loss, or set trainable to false"
    )]
    NoGradient {
        /// The parameter.
        param: String,
    },
    /// The graph has an update.
    #[error("attach_optimizer: {op} ({op_name}) updates already\nhint: attach one optimizer, once")]
    AlreadyAttached {
        /// The op.
        op: OpId,
        /// Its name.
        op_name: &'static str,
    },
    /// An operand did not fit.
    #[error(transparent)]
    Infer(#[from] InferError),
}
