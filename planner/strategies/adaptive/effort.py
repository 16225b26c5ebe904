"""All numbers that say how much ``adaptive`` tries where ranks run free, and what each is worth.

Worth was measured with one number changed at a time on 150 to 200 batches that none was chosen on (llama-3-8b,
qwen2.5-7b and gpt-7b on 4 to 192 ranks, four corpora, with and without memory policies; 32 more with pipeline stages).
"""

MAX_BUILDS = 10  # schedules built: with 6 steps take 0.08 % longer, one 2.5 %; 24 for 12 gain 0.003 %
MIN_BUILDS, ROWS_AND_RANKS = 4, 60_000  # builds times sequences and ranks: large steps get fewer, for time
CLOSE_ENOUGH = 1e-3  # of the bound: nothing more is built. At 1e-2 steps take 0.09 % longer

NUM_PARTNERS = 6  # ranks that the last to end may give to: with 3 steps take 0.03 % longer, with 1 0.09 %, one 1.6 %
LEAST_GAIN = 1e-4  # of the step, for an exchange between ranks: at 1e-3 steps take 0.04 % longer
MOVES_PER_RANK = 2  # exchanges before a build is taken as it is: never reached, a guard

MAX_LOCALS = 2  # policies of single ranks that are searched: with 1 steps take 0.5 % longer, one 22 %
NUM_VOTERS = 48  # sequences that say which policies are searched: 16 and 5,000 give the same, a guard for time

WORK_PER_GAP = 7e6  # a step's budget for rivals, for a gap of 1: runs of greedy, times sequences and ranks
LEAST_GAP, MOST_GAP = 2e-3, 3e-2  # so much is added to the gap to the bound, and no more than so much counts
NODE_WORK = 20  # a node of FlexSP's programs, in runs of greedy
# Without rivals steps take 0.07 % longer (with policies 0.5 %), one 20 %.
PACK_SHARES = (1.0, 0.5, 0.25, 0.125)  # of the capacity, for stages: without the last two, 15 % longer
