"""The losses of pretraining as their authors write them: plain loops and sums over the whole batch, for the tests."""

import math

import torch


def nt_xent(z_a, z_b, temperature):
    """Chen et al. 2020 (arXiv 2002.05709), equation 1 and algorithm 1: rows 2k - 1 and 2k are a pair."""
    z = torch.stack([z_a, z_b], dim=1).flatten(0, 1)
    count = len(z)
    similarity = [[z[i] @ z[j] / (z[i].norm() * z[j].norm()) for j in range(count)] for i in range(count)]

    def term(i, j):
        total = sum(torch.exp(similarity[i][k] / temperature) for k in range(count) if k != i)
        return -torch.log(torch.exp(similarity[i][j] / temperature) / total)

    return sum(term(k, k + 1) + term(k + 1, k) for k in range(0, count, 2)) / count


def barlow_twins(z_a, z_b, weight):
    """Zbontar et al. 2021 (arXiv 2103.03230), algorithm 1, with the epsilon of the batch norm of `main.py`."""
    a, b = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (z_a, z_b))
    loss = 0
    for i in range(a.shape[1]):
        for j in range(a.shape[1]):
            c = (a[:, i] * b[:, j]).sum() / len(a)
            loss = loss + ((1 - c) ** 2 if i == j else weight * c**2)
    return loss


def epps_pulley(numbers):
    """`EppsPulley` of rbalestr-lab/lejepa over one sample, as complex numbers on the whole interval [-3, 3]."""
    knots = [-3 + 3 * k / 16 for k in range(33)]
    total = 0
    for k, t in enumerate(knots):
        normal = math.exp(-(t**2) / 2)
        error = torch.exp(1j * t * numbers).mean() - normal
        total = total + (0.5 if k in (0, 32) else 1) * 3 / 16 * (error * error.conj()).real * normal
    return total * len(numbers)


def lejepa(views, slices, weight):
    """`MINIMAL.md` of rbalestr-lab/lejepa; the mean is of the global views, as in the paper (arXiv 2511.08544)."""
    centre = (views[0] + views[1]) / 2
    prediction = torch.stack([(centre - view).square().mean() for view in views]).mean()
    sketches = [epps_pulley(view @ direction) for view in views for direction in slices.T]
    return (1 - weight) * prediction + weight * torch.stack(sketches).mean()


def byol(predictions, targets):
    """Grill et al. 2020 (arXiv 2006.07733), equation 2 and the sum of either order."""
    loss = 0
    for q, z in ((predictions[0], targets[1]), (predictions[1], targets[0])):
        for row in range(len(q)):
            one, other = q[row] / q[row].norm(), z[row].detach() / z[row].detach().norm()
            loss = loss + (one - other).square().sum() / len(q)
    return loss


def matches(own, candidates, count):
    """The pairs (patch, nearest candidate) of one image with the smallest distances, as a set."""
    found = []
    for index, place in enumerate(own):
        distances = [(place - other).norm().item() for other in candidates]
        nearest = min(range(len(distances)), key=distances.__getitem__)
        found.append((distances[nearest], index, nearest))
    return {(index, nearest) for _, index, nearest in sorted(found)[:count]}


def local_invariance(views, counts):
    """Bardes et al. 2022 (arXiv 2210.01571), section 3: both kinds of matches, over pairs with a large view.

    Args:
        views: (embeddings, centres) of each.
        counts: Matches of a large and of a small view.
    """
    pairs = [(one, other) for one in range(2) for other in range(len(views)) if other != one]
    total = 0
    for one, other in pairs:
        for first, second in ((one, other), (other, one)):
            count = counts[0] if first < 2 else counts[1]
            for key in (0, 1):
                distances = []
                for image in range(len(views[0][0])):
                    found = matches(views[first][key][image], views[second][key][image], count)
                    maps = views[first][0][image], views[second][0][image]
                    distances += [(maps[0][i] - maps[1][j]).square().mean() for i, j in sorted(found)]
                total = total + torch.stack(distances).mean() / 2
    return total / len(pairs)


def map_terms(maps, gamma, eps):
    """`main_vicregl.py` with `fast_vc_reg`, of one view: `x.var(0)` and a covariance at each place."""
    variance = (gamma - (maps.var(0) + eps).sqrt()).relu().mean()
    covariance = 0
    for place in range(maps.shape[1]):
        centred = maps[:, place] - maps[:, place].mean(0)
        c = centred.T @ centred / (len(maps) - 1)
        covariance = covariance + (c - c.diag().diag()).square().sum() / maps.shape[2]
    return variance, covariance / maps.shape[1]
