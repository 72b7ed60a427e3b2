// The difference of two rows, by the formulas of harness/report/statistics.py: the matrix of
// differences [seed][noise set] has two crossed random factors. A test compares both.

const sum = numbers => numbers.reduce((total, number) => total + number, 0);
const squares = numbers => sum(numbers.map(number => number * number));

/** The standard error of a matrix's mean and its degrees of freedom; NaN for a single value. */
function standardError(matrix) {
  const seeds = matrix.length, sets = matrix[0].length, size = seeds * sets, all = matrix.flat();
  if (size === 1) return [NaN, 0];
  const mean = sum(all) / size;
  if (seeds === 1 || sets === 1) {
    return [Math.sqrt(squares(all.map(x => x - mean)) / (size - 1) / size), size - 1];
  }
  const bySeed = matrix.map(row => sum(row) / sets - mean);
  const bySet = matrix[0].map((_, k) => sum(matrix.map(row => row[k])) / seeds - mean);
  const left = matrix.flatMap((row, s) => row.map((x, k) => x - bySeed[s] - bySet[k] - mean));
  const free = [seeds - 1, sets - 1, (seeds - 1) * (sets - 1)];
  const sums = [sets * squares(bySeed), seeds * squares(bySet), squares(left)];
  const found = sums.map((x, i) => x / free[i]);
  const [ofSeed, ofSet, rest] = found, whole = ofSeed + ofSet - rest;
  if (whole <= rest) return [Math.sqrt(rest / size), free[2]];
  const freedom = whole * whole / sum(found.map((x, i) => x * x / free[i]));
  return [Math.sqrt(whole / size), Math.max(freedom, Math.min(...free))];
}

/** What Student's t exceeds in size with 5 %: with t = sqrt(freedom) tan(angle), the density of
 *  the angle is cos(angle) ** (freedom - 1). */
function quantile(freedom) {
  const parts = 20000, width = Math.PI / 2 / parts;
  const density = (_, i) => Math.cos((i + 0.5) * width) ** (freedom - 1);
  const weights = Array.from({length: parts}, density);
  let left = 0.95 * sum(weights), i = 0;
  while (left > weights[i]) left -= weights[i++];
  return Math.sqrt(freedom) * Math.tan((i + left / weights[i]) * width);
}

/** A metric of row a minus that of row b, paired within training seed and noise set.
 *  @returns {mean, half, seeds, sets}, half NaN without an interval; null if nothing is shared. */
function difference(a, b, metric) {
  const mine = a.metrics[metric], theirs = b.metrics[metric];
  if (!mine || !theirs || a.diverged || b.diverged) return null;
  const seeds = a.seeds.filter(seed => b.seeds.includes(seed));
  const pairs = seeds.map(seed => [mine[a.seeds.indexOf(seed)], theirs[b.seeds.indexOf(seed)]]);
  const sets = Object.keys(pairs[0]?.[0] ?? {}).filter(set => pairs.flat().every(of => set in of));
  if (!sets.length) return null;
  const matrix = pairs.map(([of, from]) => sets.map(set => of[set] - from[set]));
  const mean = sum(matrix.flat()) / (seeds.length * sets.length);
  const [error, freedom] = standardError(matrix);
  const known = seeds.length > 1 || !(a.trained || b.trained);  // one seed says nothing of another
  const half = known ? quantile(freedom) * error : NaN;
  return {mean, half, seeds: seeds.length, sets: sets.length};
}
