//! Many processes that run one program: who is in it, how they find each other, what each of them hosts.
//! Imports `exit`.

pub mod env;
