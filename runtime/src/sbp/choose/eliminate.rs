//! Minimises a sum of tables over discrete variables by eliminating one variable at a time.
//!
//! Eliminating a variable replaces all tables that contain the variable by one table. The new table covers the
//! variable's neighbours, which are the other variables of the replaced tables. For each combination of the neighbours'
//! values, the new table has the least sum over the eliminated variable's values. This is nonserial dynamic programming
//! (Bertelè and Brioschi 1972). While the tables stay small, as in programs made of layers, the result is exact and the
//! time is linear in the number of variables. If every elimination needs more than [`ENTRIES_MAX`] sums, a variable is
//! fixed at one value.

use std::collections::BTreeSet;
use std::ops::AddAssign;
use std::rc::Rc;

/// Maximum number of sums to eliminate one variable. If every variable needs more, one is fixed at a value.
pub(super) const ENTRIES_MAX: usize = 1 << 16;

/// Two sums count as equal if they differ by less than this fraction of the total of the tables' largest costs, because
/// the order of a sum changes its rounding.
const TIE: f64 = 1e-12;

/// The cost to minimise: the time and, among equal times, the number of layout changes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Cost {
    pub seconds: f64,
    pub conversions: usize,
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.seconds += other.seconds;
        self.conversions += other.conversions;
    }
}

/// A cost for each combination of values of some variables; the last variable varies fastest.
#[derive(Clone, Debug)]
pub(super) struct Table {
    /// The variables, sorted.
    pub variables: Vec<usize>,
    pub costs: Rc<[Cost]>,
}

impl Table {
    /// The largest finite cost.
    fn seconds_max(&self) -> f64 {
        self.costs.iter().map(|cost| cost.seconds).filter(|seconds| seconds.is_finite()).fold(0.0, f64::max)
    }
}

/// A value for each variable.
pub(super) struct Minimum {
    pub values: Vec<usize>,
    /// False if a variable was fixed at a value.
    pub is_exact: bool,
}

/// Finds the values with the least sum; ties go to the first values. `sizes` has the number of values of each variable.
pub(super) fn minimise(sizes: &[usize], tables: Vec<Table>) -> Minimum {
    let mut search = Elimination::new(sizes, tables);
    let mut is_exact = true;
    while let Some(&(entries, variable)) = search.queue.first() {
        if entries <= ENTRIES_MAX {
            search.eliminate(variable);
        } else {
            let most = |v: &&usize| (search.neighbours[**v].len(), std::cmp::Reverse(**v));
            let hub = search.neighbours[variable].iter().max_by_key(most).copied().unwrap_or(variable);
            search.fix(hub);
            is_exact = false;
        }
    }
    Minimum { values: search.values(), is_exact }
}

/// An eliminated variable: its value follows from the values of its neighbours.
struct Decision {
    variable: usize,
    neighbours: Vec<usize>,
    /// The best value for each combination of the neighbours' values.
    best: Vec<usize>,
}

struct Elimination<'a> {
    sizes: &'a [usize],
    tables: Vec<Table>,
    /// For each undecided variable: the tables that contain it.
    tables_of: Vec<BTreeSet<usize>>,
    /// For each variable: the variables that share a table with it.
    neighbours: Vec<BTreeSet<usize>>,
    /// The undecided variables, as `(number of sums to eliminate it, variable)`.
    queue: BTreeSet<(usize, usize)>,
    decisions: Vec<Decision>,
    /// Costs that differ by this amount or less count as equal.
    tie_seconds: f64,
}

impl<'a> Elimination<'a> {
    fn new(sizes: &'a [usize], tables: Vec<Table>) -> Self {
        let mut search = Self {
            sizes,
            tables: Vec::new(),
            tables_of: vec![BTreeSet::new(); sizes.len()],
            neighbours: vec![BTreeSet::new(); sizes.len()],
            queue: BTreeSet::new(),
            decisions: Vec::new(),
            tie_seconds: TIE * tables.iter().map(Table::seconds_max).sum::<f64>(),
        };
        tables.into_iter().for_each(|table| search.insert(table));
        search.queue = (0..sizes.len()).map(|variable| (search.entries(variable), variable)).collect();
        search
    }

    fn insert(&mut self, table: Table) {
        for &variable in &table.variables {
            self.tables_of[variable].insert(self.tables.len());
            self.neighbours[variable].extend(table.variables.iter().filter(|v| **v != variable));
        }
        self.tables.push(table);
    }

    fn entries(&self, variable: usize) -> usize {
        let neighbours = self.neighbours[variable].iter();
        neighbours.fold(self.sizes[variable], |entries, neighbour| entries.saturating_mul(self.sizes[*neighbour]))
    }

    /// Removes a variable from the graph, and returns its tables and neighbours.
    fn remove(&mut self, variable: usize) -> (Vec<Table>, Vec<usize>) {
        self.queue.remove(&(self.entries(variable), variable));
        let neighbours: Vec<usize> = std::mem::take(&mut self.neighbours[variable]).into_iter().collect();
        for &neighbour in &neighbours {
            self.queue.remove(&(self.entries(neighbour), neighbour));
            self.neighbours[neighbour].remove(&variable);
        }
        let mut tables = Vec::new();
        for id in std::mem::take(&mut self.tables_of[variable]) {
            let removed = Table { variables: Vec::new(), costs: Rc::new([]) };
            let table = std::mem::replace(&mut self.tables[id], removed);
            for other in table.variables.iter().filter(|v| **v != variable) {
                self.tables_of[*other].remove(&id);
            }
            tables.push(table);
        }
        (tables, neighbours)
    }

    /// Adds tables, and queues the neighbours again.
    fn replace(&mut self, tables: Vec<Table>, neighbours: &[usize]) {
        tables.into_iter().for_each(|table| self.insert(table));
        for &neighbour in neighbours {
            self.queue.insert((self.entries(neighbour), neighbour));
        }
    }

    fn eliminate(&mut self, variable: usize) {
        let (tables, neighbours) = self.remove(variable);
        let strides: Vec<Strides> = tables.iter().map(|t| Strides::new(t, variable, &neighbours, self.sizes)).collect();
        let (mut best, mut costs) = (Vec::new(), Vec::new());
        for_each_combination(&neighbours, self.sizes, |values| {
            let starts: Vec<usize> = strides.iter().map(|s| s.start(values)).collect();
            let cost = |value: usize| {
                let mut sum = Cost::default();
                for ((table, strides), start) in tables.iter().zip(&strides).zip(&starts) {
                    sum += table.costs[start + strides.own * value];
                }
                sum
            };
            let (value, cost) = self.least((0..self.sizes[variable]).map(cost));
            best.push(value);
            costs.push(cost);
        });
        self.decisions.push(Decision { variable, neighbours: neighbours.clone(), best });
        let table = Table { variables: neighbours.clone(), costs: costs.into() };
        self.replace(if neighbours.is_empty() { Vec::new() } else { vec![table] }, &neighbours);
    }

    /// Fixes a variable at the value with the least lower bound: the sum of its tables' least entries for that value.
    fn fix(&mut self, variable: usize) {
        let (tables, neighbours) = self.remove(variable);
        let size = self.sizes[variable];
        let slice = |table: &Table, value: usize| {
            let position = table.variables.iter().position(|v| *v == variable).unwrap_or(0);
            let inner: usize = table.variables[position + 1..].iter().map(|v| self.sizes[*v]).product();
            let costs = table.costs.iter().enumerate().filter(|(i, _)| i / inner % size == value);
            let variables = table.variables.iter().copied().filter(|v| *v != variable).collect();
            Table { variables, costs: costs.map(|(_, cost)| *cost).collect() }
        };
        let bound = |value: usize| {
            let mut sum = Cost::default();
            tables.iter().for_each(|table| sum += self.least(slice(table, value).costs.iter().copied()).1);
            sum
        };
        let (value, _) = self.least((0..size).map(bound));
        self.decisions.push(Decision { variable, neighbours: Vec::new(), best: vec![value] });
        let sliced = tables.iter().map(|table| slice(table, value)).filter(|t| !t.variables.is_empty()).collect();
        self.replace(sliced, &neighbours);
    }

    /// The first of the least costs, with its position.
    fn least(&self, costs: impl Iterator<Item = Cost>) -> (usize, Cost) {
        let mut best = (0, Cost { seconds: f64::INFINITY, conversions: usize::MAX });
        for (position, cost) in costs.enumerate() {
            let is_tie = cost.seconds == best.1.seconds || (cost.seconds - best.1.seconds).abs() <= self.tie_seconds;
            let is_less = if is_tie { cost.conversions < best.1.conversions } else { cost.seconds < best.1.seconds };
            if is_less {
                best = (position, cost);
            }
        }
        best
    }

    /// Returns the values. Computes them from the last decision to the first, because a decision depends on later ones.
    fn values(&self) -> Vec<usize> {
        let mut values = vec![0; self.sizes.len()];
        for Decision { variable, neighbours, best } in self.decisions.iter().rev() {
            let index = neighbours.iter().fold(0, |index, v| index * self.sizes[*v] + values[*v]);
            values[*variable] = best[index];
        }
        values
    }
}

/// The strides of a table: the distance between entries if the value of one variable differs by one.
struct Strides {
    own: usize,
    /// The stride of each neighbour; 0 if the table does not contain the neighbour.
    neighbours: Vec<usize>,
}

impl Strides {
    fn new(table: &Table, variable: usize, neighbours: &[usize], sizes: &[usize]) -> Self {
        let stride = |v: usize| {
            let position = table.variables.binary_search(&v).ok()?;
            Some(table.variables[position + 1..].iter().map(|v| sizes[*v]).product())
        };
        let of_neighbour = |v: &usize| stride(*v).unwrap_or(0);
        Self { own: stride(variable).unwrap_or(0), neighbours: neighbours.iter().map(of_neighbour).collect() }
    }

    fn start(&self, values: &[usize]) -> usize {
        self.neighbours.iter().zip(values).map(|(stride, value)| stride * value).sum()
    }
}

/// Calls `f` with each combination of values of these variables; the last varies fastest.
pub(super) fn for_each_combination(variables: &[usize], sizes: &[usize], mut f: impl FnMut(&[usize])) {
    let mut values = vec![0; variables.len()];
    loop {
        f(&values);
        let Some(next) = (0..values.len()).rev().find(|&i| values[i] + 1 < sizes[variables[i]]) else { return };
        values[next] += 1;
        values[next + 1..].fill(0);
    }
}
