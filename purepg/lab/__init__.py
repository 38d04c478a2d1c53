"""The gradient laboratory: on a finite MDP the policy gradient is known, and every estimator can be held against it.

Imports everything but `run`. Add what theory says of an estimator here, beside the estimator itself.

exact.py: objective, values, visitation, the gradient in its three forms, Fisher matrix, optimum
trajectories.py: every trajectory with its probability, and where an experience's states lie
theory.py: what an estimator's mean or variance should be
estimators.py: from experience to a gradient estimate, for any weight of grad log pi
accuracy.py: bias, variance, signal to noise and cosine of any estimator, and the tests of unbiasedness
"""
