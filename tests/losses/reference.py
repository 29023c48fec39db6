"""The losses once more, by explicit loops over scalars in float64: slow, near to the formulas."""

import torch


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random unit-norm float64 rows."""
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True)


def log_softmax_at(row: list, i: int):
    return row[i] - torch.stack(row).exp().sum().log()


def nce(a, b, scale, ids=None):
    n, total = len(a), 0.0
    for i in range(n):
        others = [j for j in range(n) if ids is None or j == i or ids[j] != ids[i]]
        at = others.index(i)
        total = total + log_softmax_at([scale * (a[i] * b[j]).sum() for j in others], at)
        total = total + log_softmax_at([scale * (b[i] * a[j]).sum() for j in others], at)
    return -total / (2 * n)


def instance(image, text, teacher_image, teacher_text, scale, beta, ids=None):
    return beta * nce(teacher_image, text, scale, ids) + (1 - beta) * nce(
        image, teacher_text, scale, ids
    )


def feature(image, text, teacher_image, teacher_text):
    n, width = image.shape
    total = 0.0
    for student, teacher in ((image, teacher_image), (text, teacher_text)):
        for i in range(n):
            for j in range(width):
                total = total + (student[i, j] - teacher[i, j]) ** 2
    return total / (n * width)


def kl(p_logits: list, q_logits: list):
    total = 0.0
    for j in range(len(p_logits)):
        log_p, log_q = log_softmax_at(p_logits, j), log_softmax_at(q_logits, j)
        total = total + log_p.exp() * (log_p - log_q)
    return total


def affinity(image, text, teachers, scale):
    n, total = len(image), 0.0
    for t_image, t_text, t_scale in teachers:
        for i in range(n):
            total = total + kl(
                [t_scale * (t_image[i] * t_text[j]).sum() for j in range(n)],
                [scale * (image[i] * text[j]).sum() for j in range(n)],
            )
            total = total + kl(
                [t_scale * (t_text[i] * t_image[j]).sum() for j in range(n)],
                [scale * (text[i] * image[j]).sum() for j in range(n)],
            )
    return total / (2 * n * len(teachers))


def cluster(image, teacher, labels, w, omega, alpha, reading, scale, tau, target_w=None):
    target_w = w if target_w is None else target_w
    n, discrimination, distribution = len(image), 0.0, 0.0
    for i in range(n):
        at = omega.index(int(labels[i]))
        student = [(w[j] * image[i]).sum() for j in omega]
        discrimination = discrimination - log_softmax_at([scale * x for x in student], at)
        distribution = distribution + kl(
            [(target_w[j] * teacher[i]).sum() / tau for j in omega], [x / tau for x in student]
        )
    weight = 1 - alpha if reading == "convex" else 1.0
    return weight * discrimination / n + alpha * distribution / n
