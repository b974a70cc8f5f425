//! NCCL. Imports `cuda::nccl::api`.
mod api;
pub(crate) use api::Api;
