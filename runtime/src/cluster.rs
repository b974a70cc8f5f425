//! A world of several processes: who they are, and how they meet.

pub mod rendezvous;
