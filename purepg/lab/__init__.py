"""The gradient laboratory: finite MDPs with known policy gradients, against which every estimator can be tested.

Imports everything except `run`. Add the theory of an estimator here, and the estimator itself to `equations`.

exact.py: objective, values, visitation, the gradient in two forms, Fisher matrix, optimum
trajectories.py: every trajectory with its probability, the gradient summed over them, and the states of an experience
theory.py: the expected mean or variance of estimators
estimators.py: from experience to a gradient estimate, for any weight of grad log pi
accuracy.py: bias, variance, signal to noise and cosine of an estimator, and tests of unbiasedness
pomdp.py: the best return with memory and without, where a policy observes only the alias of a state
histories.py: policies with memory: every trajectory, the exact gradient, and its bias through windows
riccati.py: value, gradient and optimum of linear-quadratic regulation
"""
