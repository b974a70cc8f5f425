//! Tests of layouts: text, regions, scatter and gather.

use super::*;
use crate::placement::Mesh;

fn layout(text: &str) -> NdSbp {
    NdSbp::parse(text).unwrap()
}

fn counting(shape: &[usize]) -> HostTensor {
    let count: usize = shape.iter().product();
    HostTensor::f32(shape, (0..count).map(|i| i as f32 - 3.0).collect())
}

#[test]
fn layouts_are_formatted_and_parsed() {
    for text in ["(S0, B)", "(P, Pmax, S12)", "()", "(B)"] {
        assert_eq!(layout(text).to_string(), text);
    }
    assert_eq!(layout("S0,B"), layout(" (S0 , B) "));
    for wrong in ["S", "Q", "S-1", "(S0", "S0,,B", "Pmin", "b"] {
        assert!(NdSbp::parse(wrong).unwrap_err().to_string().contains("S<dim>"), "{wrong}");
    }
}

#[test]
fn later_axes_split_the_parts_of_earlier_ones() {
    let place = Mesh::parse("a=2,b=3").unwrap().whole();
    let rows = |text: &str| -> Vec<(usize, usize)> {
        (0..6).map(|i| local_region(&[7, 2], &layout(text), &place, i)).map(|r| (r.start[0], r.size[0])).collect()
    };
    assert_eq!(rows("(S0, S0)"), [(0, 2), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1)]);
    assert_eq!(rows("(S0, B)"), [(0, 4), (0, 4), (0, 4), (4, 3), (4, 3), (4, 3)]);
    assert_eq!(rows("(P, S0)"), [(0, 3), (3, 2), (5, 2), (0, 3), (3, 2), (5, 2)]);
    let columns = local_region(&[7, 2], &layout("(B, S1)"), &place, 2);
    assert_eq!((columns.size.clone(), columns.is_empty()), (vec![7, 0], true));
}

#[test]
fn gather_inverts_scatter() {
    let place = Mesh::parse("a=2,b=3").unwrap().whole();
    let entries = ["S0", "S1", "B", "P", "Pmax"];
    for shape in [[7, 5], [3, 2], [1, 1], [0, 4]] {
        let whole = counting(&shape);
        for (a, b) in entries.iter().flat_map(|a| entries.map(|b| (*a, b))) {
            let layout = layout(&format!("{a},{b}"));
            let mixed = a != b && layout.0.iter().all(|s| s.is_partial());
            assert_eq!(layout.check(&shape, &place).is_err(), mixed, "{layout}");
            if mixed {
                continue;
            }
            let shards = scatter(&whole, &layout, &place, 7).unwrap();
            assert_eq!(gather(&shards, &shape, &layout, &place).unwrap(), whole, "{layout}");
        }
    }
}

#[test]
fn every_random_term_contributes() {
    let place = Mesh::parse("a=3").unwrap().whole();
    let shards = scatter(&counting(&[16]), &layout("P"), &place, 1).unwrap();
    for skipped in 0..3 {
        let mut sum = filled(&[16], shards[0].dtype(), 0.0);
        (0..3).filter(|&i| i != skipped).for_each(|i| region::combine(&mut sum, &shards[i], ReduceOp::Sum));
        assert_ne!(sum, counting(&[16]));
    }
}

#[test]
fn differing_copies_are_refused() {
    let place = Mesh::parse("a=2,b=2").unwrap().whole();
    let shape = [4, 2];
    let mut shards = scatter(&counting(&shape), &layout("S0,B"), &place, 1).unwrap();
    if let HostData::F32(data) = &mut shards[3].data {
        data[0] += 1.0;
    }
    let error = gather(&shards, &shape, &layout("S0,B"), &place).unwrap_err().to_string();
    let expected =
        "shard 3 of a tensor of shape [4, 2] in layout (S0, B): expected the same bits as shard 2, got different bits";
    assert_eq!(error, expected);
    shards[3] = counting(&[1, 2]);
    assert!(gather(&shards, &shape, &layout("S0,B"), &place).unwrap_err().to_string().contains("[1, 2]"));
    assert!(gather(&shards[..3], &shape, &layout("S0,B"), &place).is_err());
}

#[test]
fn invalid_layouts_are_refused() {
    let place = Mesh::parse("a=2,b=2").unwrap().whole();
    let why = |text: &str| layout(text).check(&[4, 4], &place).unwrap_err().to_string();
    assert!(why("S2,B").contains("no dim 2"));
    assert!(why("B").contains("one entry for each of 2 mesh axes, got 1"));
    assert!(why("P,Pmax").contains("two different reductions"));
    let ids = HostTensor::i32(&[4], vec![1, 2, 3, 4]);
    assert!(scatter(&ids, &layout("P,B"), &place, 1).unwrap_err().to_string().contains("integer tensors"));
    let shards = scatter(&ids, &layout("S0,S0"), &place, 1).unwrap();
    assert_eq!(gather(&shards, &[4], &layout("S0,S0"), &place).unwrap(), ids);
}
